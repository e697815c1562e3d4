"""A linear layer with its activation, forward and backward.

::

    z = x Wᵀ + b        y = act(z)
    dz = dy · act'(z)   dx = dz W   dW = dzᵀ x   db = Σ_rows dz

act is none, relu, gelu, gelu_tanh or silu, as ``torch.nn.functional`` defines them. The backward
needs z for the last three and y for relu; z is computed and kept only then.

On the CPU the product is fastmp's own where it is the fastest one (``csrc/cpu/gemm.h``), with bias
and activation applied to the sums in fp32 before they are rounded; elsewhere torch's, followed by
one native pass. The backward of activation and bias is one native pass in both cases.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends import cpu
from fastmp.backends.table import DTYPE_CODES, Activation

ACTIVATIONS = tuple(a.name.lower() for a in Activation)


# Multiply-adds from which on a call on the CPU gains more than its 15 us, forward and backward 60.
_WORTH_A_CALL = {torch.float32: 1 << 22, torch.bfloat16: 300_000_000}


def worthwhile(input: Tensor, weight: Tensor) -> bool:
    """Whether the operation beats torch's linear followed by the activation.

    On the CPU torch multiplies fp32 at 0.7 and bf16 at 0.95 of our rate, and knows better than to
    pack a matrix for a few rows or columns. Its fp16 is too slow for any of this.
    """
    threshold = _WORTH_A_CALL.get(input.dtype)
    if threshold is None or input.device.type != "cpu":
        return True
    rows, (columns, depth) = input.shape[:-1].numel(), weight.shape
    return min(rows, columns) >= 4 and rows * columns * depth >= threshold


def saves_preactivation(activation: str) -> bool:
    """Whether the backward of this activation needs z; none needs nothing, relu the output."""
    return activation not in ("none", "relu")


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as a matrix of rows; unlike reshape(-1, n) also for n = 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


# ---- reference: plain PyTorch, any floating dtype, any device ----


def _sums(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` on a matrix of rows: of more dimensions torch sums some layouts of bf16 in bf16.

    The result is no view: autograd forbids to write to a view that was made inside an operation.
    """
    z = F.linear(_rows(input), weight, bias)
    shape = (*input.shape[:-1], weight.shape[0])
    return cast(Tensor, torch.ops.aten._unsafe_view(z, shape))


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z), by torch's own functions."""
    if activation == "none":
        return z
    if activation.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"relu": F.relu, "silu": F.silu}[activation](z)


def _activation_gradient(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "none":
        return grad
    if activation == "relu":
        return cast(Tensor, aten.threshold_backward(grad, saved, 0))
    if activation == "silu":
        return cast(Tensor, aten.silu_backward(grad, saved))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return cast(Tensor, aten.gelu_backward(grad, saved, approximate=approximate))


def linear_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear`` in plain PyTorch.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), the dtype of input.
        bias: (out_features) or None.
        activation: one of ``ACTIVATIONS``.
        save: whether to return z; ignored where the backward does not need it.

    Returns:
        y, (..., out_features), and z of the same shape, or an empty tensor.
    """
    z = _sums(input, weight, bias)
    y = activate(z, activation)
    return y, z if save and saves_preactivation(activation) else input.new_empty(0)


def backward_reference(
    grad: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_backward`` in plain PyTorch.

    Args:
        grad: dy, (..., out_features).
        saved: z, or y for relu, of the same shape; not read for none.
        input, weight: as in the forward; read only where a gradient needs them.
        activation: one of ``ACTIVATIONS``.
        needs: whether to compute dx, dW and db.

    Returns:
        dx, dW and db in the dtype of ``grad``; an empty tensor (of its own: the results of an
        operation must not share memory) for each that is not needed.
    """
    dz = _rows(_activation_gradient(grad, saved, activation))
    dx = (dz @ weight).view(input.shape) if needs[0] else grad.new_empty(0)
    dw = dz.t() @ _rows(input) if needs[1] else grad.new_empty(0)
    db = dz.sum(0) if needs[2] else grad.new_empty(0)
    return dx, dw, db


# ---- CPU: the native library ----


def _side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows or its columns are dense, else a copy."""
    # Not contiguous(): that leaves a 1 x 1 matrix the strides it has.
    return matrix if 1 in matrix.stride() else matrix.clone(memory_format=torch.contiguous_format)


def _product(
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
    args = cpu.GemmArgs(
        a=a.data_ptr(),
        a_stride=a.stride(0),
        a_k_stride=a.stride(1),
        b=b.data_ptr(),
        b_stride=b.stride(1),
        b_k_stride=b.stride(0),
        rows=a.shape[0],
        columns=b.shape[1],
        depth=a.shape[1],
        dtype=DTYPE_CODES[a.dtype],
        activation=Activation[activation.upper()],
        bias=None if bias is None else bias.data_ptr(),
        preactivation=None if z is None else z.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    cpu.call("fastmp_gemm", args)
    return out


def linear_cpu(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear`` on the native library; arguments as ``linear_reference``."""
    if input.dtype not in DTYPE_CODES:
        return linear_reference(input, weight, bias, activation, save)
    shape = (*input.shape[:-1], weight.shape[0])
    save = save and saves_preactivation(activation)
    if cpu.multiplies(input.dtype):
        z = input.new_empty(shape if save else 0)
        y = _product(_rows(input), weight.t(), shape, bias, activation, z if save else None)
        return y, z
    z = _sums(input, weight, bias).contiguous()
    if activation == "none":
        return z, input.new_empty(0)
    y = torch.empty_like(z) if save else z
    args = cpu.ActivationArgs(
        saved=z.data_ptr(),
        out=y.data_ptr(),
        rows=z.shape[:-1].numel(),
        columns=z.shape[-1],
        dtype=DTYPE_CODES[z.dtype],
        activation=Activation[activation.upper()],
    )
    cpu.call("fastmp_activation", args)
    return y, z if save else input.new_empty(0)


def _activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dz and db of dense matrices, in one pass over them."""
    dz = grad if activation == "none" else torch.empty_like(grad)
    db = grad.new_empty(grad.shape[1] if needs_bias else 0)
    if activation == "none" and not needs_bias:
        return dz, db
    args = cpu.ActivationArgs(
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


def backward_cpu(
    grad: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_backward`` on the native library; arguments as ``backward_reference``."""
    if grad.dtype not in DTYPE_CODES:
        return backward_reference(grad, saved, input, weight, activation, needs)
    rows = _rows(grad).contiguous()
    dz, db = _activation_backward(rows, saved.contiguous(), activation, needs[2])
    if cpu.multiplies(grad.dtype):
        dx = _product(dz, weight, input.shape) if needs[0] else grad.new_empty(0)
        dw = _product(dz.t(), _rows(input), weight.shape) if needs[1] else grad.new_empty(0)
    else:
        dx = (dz @ weight).view(input.shape) if needs[0] else grad.new_empty(0)
        dw = dz.t() @ _rows(input) if needs[1] else grad.new_empty(0)
    return dx, dw, db


# ---- schema, fakes, registration ----


def _linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    shape = (*input.shape[:-1], weight.shape[0])
    save = save and saves_preactivation(activation)
    return input.new_empty(shape), input.new_empty(shape if save else 0)


def _backward_fake(
    grad: Tensor, saved: Tensor, input: Tensor, weight: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes: tuple[Any, ...] = (input.shape, weight.shape, weight.shape[:1])
    dx, dw, db = (
        grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)
    )
    return dx, dw, db


_library = torch.library.Library("fastmp", "FRAGMENT")
_library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, str activation, bool save) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_backward(Tensor grad, Tensor saved, Tensor input, Tensor weight, str activation, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear", linear_reference, "CompositeExplicitAutograd")
_library.impl("linear_backward", backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake("fastmp::linear", _linear_fake, lib=_library)
torch.library.register_fake("fastmp::linear_backward", _backward_fake, lib=_library)

_own = [str(d).removeprefix("torch.") for d in DTYPE_CODES if cpu.multiplies(d)]
if cpu.serves("linear", f"products of its own in {', '.join(_own)}"):
    _library.impl("linear", linear_cpu, "CPU")
    _library.impl("linear_backward", backward_cpu, "CPU")
