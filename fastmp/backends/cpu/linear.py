"""The linear layer on the native library, and when to use it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends import cpu, registry, torch_linear
from fastmp.backends.abi import ACTIVATION_CODES, DTYPE_CODES, unsupported_dtype
from fastmp.backends.cpu import gemm_choice
from fastmp.backends.cpu.structs import ActivationArgs, GemmArgs
from fastmp.backends.torch_linear import as_rows, saves_preactivation

# Multiply-adds from which on a call gains more than its 15 us, forward and backward 60.
_WORTH_A_CALL = {torch.float32: 1 << 22, torch.bfloat16: 300_000_000}


def worthwhile(input: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether the operation beats torch's linear followed by the activation.

    torch multiplies fp32 at 0.7 and bf16 at 0.95 of our rate, and does not pack a matrix for a few
    rows or columns. Its fp16 is slower than ours at any size.
    """
    threshold = _WORTH_A_CALL.get(input.dtype)
    if threshold is None:
        return True
    m, (n, k) = input.shape[:-1].numel(), weight.shape
    return min(m, n) >= 4 and m * n * k >= threshold


def _supports(input: Tensor, *_: object) -> str | None:
    return unsupported_dtype(input.dtype)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear``; the product is torch's where that is faster, followed by one pass."""
    shape = (*input.shape[:-1], weight.shape[0])
    save = save and saves_preactivation(activation)
    if gemm_choice.prefers_own(input.dtype):
        z = input.new_empty(shape if save else 0)
        y = gemm(as_rows(input), weight.t(), shape, bias, activation, z if save else None)
        return y, z
    z = torch_linear.product(input, weight, bias).contiguous()
    if activation == "none":
        return z, input.new_empty(0)
    y = activate(z, activation, in_place=not save)
    return y, z if save else input.new_empty(0)


def linear_backward(
    grad: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_backward``; the products are torch's where those are faster."""
    dz, db, _ = activation_backward(as_rows(grad), saved, activation, needs[2], False)
    if gemm_choice.prefers_own(grad.dtype):
        dx = gemm(dz, weight, input.shape) if needs[0] else grad.new_empty(0)
        dw = gemm(dz.t(), as_rows(input), weight.shape) if needs[1] else grad.new_empty(0)
    else:
        dx, dw = torch_linear.product_gradients(dz, input, weight, needs)
    return dx, dw, db


def _with_dense_dimension(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows or its columns are dense, else a copy."""
    # Not contiguous(): that leaves a 1 x 1 matrix the strides it has.
    return matrix if 1 in matrix.stride() else matrix.clone(memory_format=torch.contiguous_format)


def gemm(
    a: Tensor,
    b: Tensor,
    shape: tuple[int, ...],
    bias: Tensor | None = None,
    activation: str = "none",
    z: Tensor | None = None,
) -> Tensor:
    """act(a @ b + bias) on the native library; the sum before act goes to z, if given.

    The result is no view, which is why it has its shape from the start.
    """
    a, b = _with_dense_dimension(a), _with_dense_dimension(b)
    out = a.new_empty(shape)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    args = GemmArgs(
        a=a.data_ptr(),
        a_stride=a.stride(0),
        a_k_stride=a.stride(1),
        b=b.data_ptr(),
        b_stride=b.stride(1),
        b_k_stride=b.stride(0),
        m=a.shape[0],
        n=b.shape[1],
        k=a.shape[1],
        dtype=DTYPE_CODES[a.dtype],
        activation=ACTIVATION_CODES[activation],
        bias=None if bias is None else bias.data_ptr(),
        preactivation=None if z is None else z.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    cpu.call("fastmp_gemm", args)
    return out


def activate(z: Tensor, activation: str, in_place: bool) -> Tensor:
    """act(z) of a dense z, any but none, in one pass over it."""
    y = z if in_place else torch.empty_like(z)
    args = ActivationArgs(
        saved=z.data_ptr(),
        out=y.data_ptr(),
        rows=z.shape[:-1].numel(),
        columns=z.shape[-1],
        dtype=DTYPE_CODES[z.dtype],
        activation=ACTIVATION_CODES[activation],
    )
    cpu.call("fastmp_activation", args)
    return y


def activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, needs_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::activation_backward``, and for none: dz is grad, db its sums."""
    grad, saved = grad.contiguous(), saved.contiguous()
    dz = grad if activation == "none" else torch.empty_like(grad)
    db = grad.new_empty(grad.shape[-1] if needs_bias else 0)
    y = activate(saved, activation, in_place=False) if needs_output else grad.new_empty(0)
    if activation == "none" and not needs_bias:
        return dz, db, y
    args = ActivationArgs(
        saved=None if activation == "none" else saved.data_ptr(),
        grad_output=grad.data_ptr(),
        out=None if activation == "none" else dz.data_ptr(),
        grad_bias=db.data_ptr() if needs_bias else None,
        rows=grad.shape[:-1].numel(),
        columns=grad.shape[-1],
        dtype=DTYPE_CODES[grad.dtype],
        activation=ACTIVATION_CODES[activation],
    )
    cpu.call("fastmp_activation_backward", args)
    return dz, db, y


registry.register(
    "linear",
    "cpu",
    linear,
    backend="cpu",
    supports=_supports,
    worthwhile=worthwhile,
    detail=gemm_choice.describe(gemm_choice.processor()),
)
registry.register("linear_backward", "cpu", linear_backward, backend="cpu", supports=_supports)
registry.register(
    "activation_backward",
    "cpu",
    activation_backward,
    backend="cpu",
    supports=_supports,
    worthwhile=lambda activation: activation != "relu",  # a call takes longer than torch's pass
    recomputes=lambda: False,  # 1 to 3% of a step of eight MLPs, 384 and 768 wide
)
