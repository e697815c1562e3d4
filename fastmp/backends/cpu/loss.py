"""The loss on the native library: tensors in, ``LossArgs`` across, tensors out.

The formulas are those of ``csrc/cpu/loss.cpp``, the arguments those of ``fastmp.ops.loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.backends import cpu, registry
from fastmp.backends.abi import DTYPE_CODES, LossSpec, Reduction, unsupported_dtype
from fastmp.backends.cpu.structs import LossArgs, Status

_DENSE = torch.contiguous_format


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _call(
    name: str,
    grad_output: Tensor | None,
    logits: Tensor,
    spec: LossSpec,
    **outputs: int | None,
) -> None:
    """Call an entry point; ``outputs`` are the addresses of loss, stats and grad.

    Raises:
        IndexError: a target is out of range.
    """
    rows, classes = logits.shape
    stride = logits.stride()
    if stride[1] != 1 and classes > 1:
        logits, stride = logits.contiguous(), (classes, 1)
    target_a = spec.target_a.contiguous()
    target_b = None if spec.target_b is None else spec.target_b.contiguous()
    lam, weight, grad_output = _fp32(spec.lam), _fp32(spec.weight), _fp32(grad_output)
    args = LossArgs(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        reduction=spec.reduction,
        rows=rows,
        classes=classes,
        row_stride=stride[0],
        target_a=target_a.data_ptr(),
        target_b=_address(target_b),
        lam=_address(lam),
        lam_stride=0 if lam is None else lam.dim(),
        weight=_address(weight),
        ignore_index=spec.ignore_index,
        smoothing=spec.smoothing,
        grad_output=_address(grad_output),
        grad_output_stride=0 if grad_output is None else grad_output.dim(),
        **outputs,
    )
    if cpu.call(name, args) == Status.BAD_TARGET:
        raise spec.target_error(int(args.bad_row), int(args.bad_target), classes)


def forward(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward``; raises IndexError where a target is out of range."""
    grad = torch.empty_like(logits, memory_format=_DENSE) if compute_grad else logits.new_empty(0)
    return *_forward(logits, assumed_grad_output, spec, grad), grad


def forward_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_``: a row is exp(z) in scratch before its gradient is written.

    Raises:
        IndexError: a target is out of range.
    """
    return _forward(logits, assumed_grad_output, spec, logits)


def _forward(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec, grad: Tensor
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    shape = (rows,) if spec.reduction == Reduction.NONE else ()
    loss = torch.empty(shape, dtype=torch.float32, device="cpu")
    stats = torch.ones((rows + 1, 2), dtype=torch.float32, device="cpu")
    _call(
        "fastmp_loss_forward",
        assumed_grad_output,
        logits,
        spec,
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        grad=grad.data_ptr() if grad.numel() else None,
    )
    return loss, stats


def backward(grad_output: Tensor, logits: Tensor, stats: Tensor, spec: LossSpec) -> Tensor:
    """``fastmp::loss_backward``; raises IndexError where a target is out of range."""
    stats = stats.contiguous()
    grad = torch.empty_like(logits, memory_format=_DENSE)
    _call(
        "fastmp_loss_backward",
        grad_output,
        logits,
        spec,
        stats=stats.data_ptr(),
        grad=grad.data_ptr(),
    )
    return grad


def _supports_forward(logits: Tensor, *_: Any) -> str | None:
    return unsupported_dtype(logits.dtype)


def _supports_in_place(logits: Tensor, *_: Any) -> str | None:
    if not logits.is_contiguous():
        return "the gradient is dense, these logits are not"
    return unsupported_dtype(logits.dtype)


def _supports_backward(grad_output: Tensor, logits: Tensor, *_: Any) -> str | None:
    return unsupported_dtype(logits.dtype)


registry.register(
    "loss_forward",
    "cpu",
    forward,
    backend="cpu",
    supports=_supports_forward,
    precomputes_grad=lambda *_: True,
)
registry.register(
    "loss_forward_", "cpu", forward_in_place, backend="cpu", supports=_supports_in_place
)
registry.register("loss_backward", "cpu", backward, backend="cpu", supports=_supports_backward)
