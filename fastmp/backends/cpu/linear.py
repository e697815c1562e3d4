"""The linear layer on the native library: tensors in, ``GemmArgs`` and ``ActivationArgs`` across.

What is computed here and what by torch is decided in ``fastmp.ops.linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends import cpu
from fastmp.backends.abi import DTYPE_CODES, Activation
from fastmp.backends.cpu.structs import ActivationArgs, GemmArgs


def _side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows or its columns are dense, else a copy."""
    # Not contiguous(): that leaves a 1 x 1 matrix the strides it has.
    return matrix if 1 in matrix.stride() else matrix.clone(memory_format=torch.contiguous_format)


def product(
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
    a, b = _side_by_side(a), _side_by_side(b)
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
        activation=Activation[activation.upper()],
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
        activation=Activation[activation.upper()],
    )
    cpu.call("fastmp_activation", args)
    return y


def activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dz and db, the latter empty unless needed, in one pass over matrices of rows."""
    grad, saved = grad.contiguous(), saved.contiguous()
    dz = grad if activation == "none" else torch.empty_like(grad)
    db = grad.new_empty(grad.shape[1] if needs_bias else 0)
    if activation == "none" and not needs_bias:
        return dz, db
    args = ActivationArgs(
        saved=None if activation == "none" else saved.data_ptr(),
        grad_output=grad.data_ptr(),
        out=None if activation == "none" else dz.data_ptr(),
        grad_bias=db.data_ptr() if needs_bias else None,
        rows=grad.shape[0],
        columns=grad.shape[1],
        dtype=DTYPE_CODES[grad.dtype],
        activation=Activation[activation.upper()],
    )
    cpu.call("fastmp_activation_backward", args)
    return dz, db
