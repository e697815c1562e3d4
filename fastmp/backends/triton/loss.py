"""The loss on the Triton kernels, and when its forward writes the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends import registry, triton
from fastmp.backends.abi import LossSpec, unsupported_dtype


def _supports(logits: Tensor) -> str | None:
    if logits.numel() == 0:
        return "nothing to compute"
    return unsupported_dtype(logits.dtype) or triton.supports_device(logits.device)


def precomputes_grad(logits: Tensor, assumed_grad_output: Tensor | None) -> bool:
    """Whether the kernel runs and the assumption is likely right.

    It is wrong for fp16 without ``grad_scale``: a loss scale will come.
    """
    likely = assumed_grad_output is not None or logits.dtype != torch.float16
    return likely and triton.load()[0] is not None and _supports(logits) is None


def forward(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward``."""
    from fastmp.backends.triton.kernels import loss

    with torch.cuda.device_of(logits):
        return loss.forward(logits, assumed_grad_output, compute_grad, spec)


def forward_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_``."""
    from fastmp.backends.triton.kernels import loss

    with torch.cuda.device_of(logits):
        return loss.forward_in_place(logits, assumed_grad_output, spec)


def _supports_in_place(logits: Tensor, *_: object) -> str | None:
    if not logits.is_contiguous():
        return "the gradient is dense, these logits are not"
    return _supports(logits)


def backward(grad_output: Tensor, logits: Tensor, stats: Tensor, spec: LossSpec) -> Tensor:
    """``fastmp::loss_backward``."""
    from fastmp.backends.triton.kernels import loss

    with torch.cuda.device_of(logits):
        return loss.backward(grad_output, logits, stats, spec)


def ensure_grad(
    grad: Tensor,
    assumed_grad_output: Tensor | None,
    grad_output: Tensor,
    logits: Tensor,
    stats: Tensor,
    spec: LossSpec,
) -> None:
    """``fastmp::loss_ensure_grad_``: the device compares, the host does not wait."""
    from fastmp.backends.triton.kernels import loss

    with torch.cuda.device_of(logits):
        loss.ensure_grad(grad, assumed_grad_output, grad_output, logits, stats, spec)


def columns(
    logits: Tensor,
    rows: Tensor,
    first: int,
    target_a: Tensor,
    target_b: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> None:
    """``fastmp::loss_columns_``."""
    from fastmp.backends.triton.kernels import loss_columns

    with torch.cuda.device_of(logits):
        loss_columns.columns(logits, rows, first, target_a, target_b, weight, ignore_index)


def scale(out: Tensor, values: Tensor, factor: Tensor) -> None:
    """``fastmp::linear_loss_scale_``."""
    from fastmp.backends.triton.kernels import loss_scale

    with torch.cuda.device_of(values):
        loss_scale.scale(out, values, factor)


def _supports_scale(out: Tensor, values: Tensor, factor: Tensor) -> str | None:
    if not (out.is_contiguous() and values.is_contiguous()) or registry.on_host(factor):
        return "dense tensors and a factor of the device"
    return unsupported_dtype(out.dtype, factor.dtype) or _supports(values)


registry.register("linear_loss_scale_", "cuda", scale, backend="triton", supports=_supports_scale)
registry.register(
    "loss_forward",
    "cuda",
    forward,
    backend="triton",
    supports=lambda logits, *_: _supports(logits),
    precomputes_grad=precomputes_grad,
)
registry.register(
    "loss_forward_", "cuda", forward_in_place, backend="triton", supports=_supports_in_place
)
registry.register(
    "loss_backward",
    "cuda",
    backward,
    backend="triton",
    supports=lambda grad_output, logits, *_: _supports(logits),
)
registry.register(
    "loss_ensure_grad_", "cuda", ensure_grad, backend="triton",
    supports=lambda grad, *_: _supports(grad),
)  # fmt: skip
registry.register("loss_columns_", "cuda", columns, backend="triton", supports=_supports_in_place)
