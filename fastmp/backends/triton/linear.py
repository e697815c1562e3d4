"""The linear layer on the Triton kernels, where they beat the vendor's product."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastmp.backends import registry, torch_linear, triton
from fastmp.backends.abi import unsupported_dtype
from fastmp.backends.torch_linear import as_rows
from fastmp.backends.triton.tiles import MAX_FUSED_K, VECTOR

# The calls take the host 50 us longer than torch's own: the forward and the backward of so many
# multiply-adds take the device as long, at 500 TFLOP/s. A prediction, not yet measured.
_WORTH_A_CALL = 1 << 32

# Coordinates are 32-bit, also those of the last tile's last row, and so are offsets within a tile
# of 128 rows.
_MAX_ROWS = 2**31 - 256
_MAX_ROW_STRIDE = 2**24


def worthwhile(input: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether the operation beats torch's linear followed by the activation.

    Nothing beats the vendor's product where there is no activation to fuse with it.
    """
    m, (n, k) = input.shape[:-1].numel(), weight.shape
    return activation != "none" and m * n * k >= _WORTH_A_CALL


def fused_is_faster(k: int, activation: str) -> bool:
    """Whether our product with its activation beats the vendor's product and a pass after it."""
    return k <= MAX_FUSED_K[activation]


def takes_vendor_epilogue(
    dtype: torch.dtype, bias: Tensor | None, activation: str, save: bool
) -> bool:
    """Whether cuBLASLt's product with bias and activation is the fastest: where it has the latter.

    NVIDIA H200, 2026-11-26, bf16, forward, us, N = 4 K, M as in ``tiles.py``: relu 193 (K = 1024),
    59 (512), 180 (768), ours 202, 62, 179, product and pass 254 (1024). gelu_tanh without z 210,
    69, 200, ours before the cheaper exponential 237, 81, 220. It writes no z, which relu's backward
    does not need.
    """
    fused = activation == "relu" or (activation == "gelu_tanh" and not save)
    half = dtype in (torch.float16, torch.bfloat16)
    return fused and half and bias is not None and torch_linear.has_epilogue()


def _rows_are_vectors(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return (
        0 < rows <= _MAX_ROWS
        and 0 < columns <= matrix.stride(0) <= _MAX_ROW_STRIDE
        and columns % VECTOR == 0
        and matrix.stride(0) % VECTOR == 0
        and matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
    )


def supports_operands(input: Tensor, weight: Tensor) -> str | None:
    """None, or the reason why the kernels cannot take x (..., K) and W (N, K).

    Every row must start at a 16-byte boundary.
    """
    if input.dtype not in (torch.float16, torch.bfloat16) or input.dtype != weight.dtype:
        return f"no kernel for {input.dtype} times {weight.dtype}"
    n, k = weight.shape
    if n % VECTOR or n > _MAX_ROW_STRIDE or not _rows_are_vectors(weight):
        return "the rows of the weight are not 16-byte vectors"
    try:
        rows = input.view(-1, k) if input.dim() > 2 else as_rows(input)
    except RuntimeError:  # flattening copies: the rows will be dense
        return None
    return None if _rows_are_vectors(rows) else "the rows of the input are not 16-byte vectors"


def _supports_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> str | None:
    reason = triton.supports_device(input.device)
    if reason is None and takes_vendor_epilogue(input.dtype, bias, activation, save):
        return None if input.numel() and weight.numel() else "nothing to multiply"
    reason = reason or supports_operands(input, weight)
    if reason is None and not fused_is_faster(weight.shape[1], activation):
        return f"torch's product is faster for K = {weight.shape[1]} and {activation}"
    return reason


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear``."""
    if bias is not None and takes_vendor_epilogue(input.dtype, bias, activation, save):
        return torch_linear.activated_product(input, weight, bias, activation), input.new_empty(0)
    from fastmp.backends.triton.kernels import linear as kernels

    shape = (*input.shape[:-1], weight.shape[0])
    with torch.cuda.device_of(input):
        y, z = kernels.linear(as_rows(input), weight, bias, activation, save)
    view = torch.ops.aten._unsafe_view
    return view(y, shape), view(z, shape) if z.numel() else z


def _supports_backward(grad: Tensor, *_: object) -> str | None:
    if grad.numel() == 0:
        return "nothing to compute"
    return unsupported_dtype(grad.dtype) or triton.supports_device(grad.device)


def linear_backward(
    grad: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_backward``; its two products are torch's."""
    dz, db = _activation_backward(grad, saved, activation, needs[2])
    dx, dw = torch_linear.product_gradients(dz, input, weight, needs)
    return dx, dw, db


def _activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dz as a matrix of rows, and db; act(saved) goes to y, if given."""
    from fastmp.backends.triton.kernels import activation as kernels

    rows = as_rows(grad).contiguous()
    with torch.cuda.device_of(grad):
        saved = saved.contiguous().view(-1, rows.shape[1])
        return kernels.activation_backward(rows, saved, activation, needs_bias, y)


def activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, needs_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::activation_backward``."""
    y = grad.new_empty(grad.shape if needs_output else 0)
    dz, db = _activation_backward(grad, saved, activation, needs_bias, y if needs_output else None)
    return cast(Tensor, torch.ops.aten._unsafe_view(dz, grad.shape)), db, y


registry.register(
    "linear",
    "cuda",
    linear,
    backend="triton",
    supports=_supports_forward,
    worthwhile=worthwhile,
    detail="products in fp16 and bf16, with an activation; others are torch's",
)
registry.register(
    "linear_backward", "cuda", linear_backward, backend="triton", supports=_supports_backward
)
registry.register(
    "activation_backward",
    "cuda",
    activation_backward,
    backend="triton",
    supports=_supports_backward,
)
