"""The loss on the native library: tensors in, ``LossArgs`` across, tensors out.

The formulas and the arguments are those of ``fastmp.ops.loss``, which checks them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends import cpu
from fastmp.backends.abi import DTYPE_CODES
from fastmp.backends.cpu.structs import LossArgs, Status

_NONE = 0


class BadTarget(Exception):
    """The library met a target out of range: ``value``, in ``row`` of one of the two targets."""

    def __init__(self, row: int, value: int) -> None:
        super().__init__(row, value)
        self.row, self.value = row, value


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, args: LossArgs) -> None:
    if cpu.call(name, args) == Status.BAD_TARGET:
        raise BadTarget(int(args.bad_row), int(args.bad_target))


def _native_args(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    incoming: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> tuple[LossArgs, list[Tensor | None]]:
    """The struct of a call, and the tensors that must stay alive until it returns."""
    rows, classes = logits.shape
    if logits.stride(1) != 1 and classes > 1:
        logits = logits.contiguous()
    kept: list[Tensor | None] = [logits, target.contiguous()]
    kept.append(None if target_b is None else target_b.contiguous())
    kept += [
        None if values is None else values.to(torch.float32).contiguous()
        for values in (lam, weight, incoming)
    ]
    args = LossArgs(
        dtype=DTYPE_CODES[logits.dtype],
        reduction=reduction,
        rows=rows,
        classes=classes,
        row_stride=logits.stride(0),
        ignore_index=ignore_index,
        smoothing=smoothing,
        lam_stride=0 if lam is None else lam.dim(),
        grad_output_stride=0 if incoming is None else incoming.dim(),
    )
    fields = ("logits", "target_a", "target_b", "lam", "weight", "grad_output")
    for field, tensor in zip(fields, kept, strict=True):
        setattr(args, field, _address(tensor))
    return args, kept


def forward(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    grad_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the statistics of the rows and, if asked for, the gradient.

    Args:
        logits: (N, C), of a dtype in ``DTYPE_CODES``; the rest as ``ops.loss.forward_reference``.

    Raises:
        BadTarget: a target is out of range.
    """
    rows, classes = logits.shape
    args, _kept = _native_args(
        logits, target, target_b, lam, weight, grad_scale, ignore_index, reduction, smoothing
    )
    loss = torch.empty(rows if reduction == _NONE else (), dtype=torch.float32)
    stats = torch.empty((rows, 2), dtype=torch.float32)
    grad = torch.empty((rows, classes) if with_grad else 0, dtype=logits.dtype)
    args.loss, args.stats = loss.data_ptr(), stats.data_ptr()
    if with_grad and grad.numel():
        args.grad = grad.data_ptr()
    _run("fastmp_loss_forward", args)
    return loss, stats, grad


def backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> Tensor:
    """The gradient anew, for whatever incoming gradient there is.

    Args:
        logits: (N, C), of a dtype in ``DTYPE_CODES``; the rest as ``ops.loss.backward_reference``.

    Raises:
        BadTarget: a target is out of range.
    """
    args, _kept = _native_args(
        logits, target, target_b, lam, weight, grad_output, ignore_index, reduction, smoothing
    )
    stats = stats.contiguous()
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    args.stats, args.grad = stats.data_ptr(), grad.data_ptr()
    _run("fastmp_loss_backward", args)
    return grad
