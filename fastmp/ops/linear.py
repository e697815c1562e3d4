"""A linear layer with its activation, forward and backward.

::

    z = x Wᵀ + b        y = act(z)
    dz = dy · act'(z)   dx = dz W   dW = dzᵀ x   db = Σ_rows dz

act is none, relu, gelu, gelu_tanh or silu, as ``torch.nn.functional`` defines them. The backward
needs z for the last three and y for relu; z is computed and kept only then.

The product is fastmp's own where it is the fastest one (on the CPU ``csrc/cpu/gemm.h``, on NVIDIA
GPUs ``backends/triton/linear.py``): bias and activation are applied to the sums in fp32 before they
are rounded. Elsewhere it is torch's, followed by a pass for the activation. The backward of
activation and bias is one pass of ours in both cases, its two products are whoever's are faster.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends import cpu, triton
from fastmp.backends.abi import DTYPE_CODES, Activation
from fastmp.backends.cpu import linear as cpu_linear
from fastmp.backends.torch_matmul import matmul

ACTIVATIONS = tuple(a.name.lower() for a in Activation)


# Multiply-adds from which on a call on the CPU gains more than its 15 us, forward and backward 60.
_WORTH_A_CALL = {torch.float32: 1 << 22, torch.bfloat16: 300_000_000}
# On a GPU the same calls take the host 50 us longer than torch's own: the forward and the backward
# of so many take the device as long, at 500 TFLOP/s. A prediction, not yet measured.
_WORTH_A_CALL_ON_GPU = 1 << 32


def worthwhile(input: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether the operation beats torch's linear followed by the activation.

    On the CPU torch multiplies fp32 at 0.7 and bf16 at 0.95 of our rate, and knows better than to
    pack a matrix for a few rows or columns. Its fp16 is too slow for any of this. On a GPU nothing
    beats the vendor's product where there is no activation to fuse with it.
    """
    rows, (columns, depth) = input.shape[:-1].numel(), weight.shape
    products = rows * columns * depth
    if input.device.type == "cuda":
        return activation != "none" and products >= _WORTH_A_CALL_ON_GPU
    threshold = _WORTH_A_CALL.get(input.dtype)
    if threshold is None or input.device.type != "cpu":
        return True
    return min(rows, columns) >= 4 and products >= threshold


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
    z = matmul(_rows(input), weight.t(), bias)
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
    dx = matmul(dz, weight).view(input.shape) if needs[0] else grad.new_empty(0)
    dw = matmul(dz.t(), _rows(input)) if needs[1] else grad.new_empty(0)
    db = dz.sum(0) if needs[2] else grad.new_empty(0)
    return dx, dw, db


# ---- CPU: the native library ----


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
        kept = z if save else None
        y = cpu_linear.product(_rows(input), weight.t(), shape, bias, activation, kept)
        return y, z
    z = _sums(input, weight, bias).contiguous()
    if activation == "none":
        return z, input.new_empty(0)
    y = cpu_linear.activate(z, activation, in_place=not save)
    return y, z if save else input.new_empty(0)


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
    dz, db = cpu_linear.activation_backward(_rows(grad), saved, activation, needs[2])
    if cpu.multiplies(grad.dtype):
        dx = cpu_linear.product(dz, weight, input.shape) if needs[0] else grad.new_empty(0)
        dw = (
            cpu_linear.product(dz.t(), _rows(input), weight.shape)
            if needs[1]
            else grad.new_empty(0)
        )
    else:
        dx = matmul(dz, weight).view(input.shape) if needs[0] else grad.new_empty(0)
        dw = matmul(dz.t(), _rows(input)) if needs[1] else grad.new_empty(0)
    return dx, dw, db


# ---- Triton: NVIDIA GPUs ----


def linear_cuda(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """``fastmp::linear`` on the Triton kernels; arguments as ``linear_reference``."""
    if triton.runs_on(input.device):
        from fastmp.backends.triton import linear as kernels

        rows = _rows(input)
        if kernels.serves(rows, weight) and kernels.fused_is_faster(weight.shape[1], activation):
            shape = (*input.shape[:-1], weight.shape[0])
            with torch.cuda.device_of(input):
                y, z = kernels.linear(rows, weight, bias, activation, save)
            view = torch.ops.aten._unsafe_view
            return view(y, shape), view(z, shape) if z.numel() else z
    return linear_reference(input, weight, bias, activation, save)


def backward_cuda(
    grad: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::linear_backward`` on the Triton kernels; arguments as ``backward_reference``."""
    if grad.dtype not in DTYPE_CODES or grad.numel() == 0 or not triton.runs_on(grad.device):
        return backward_reference(grad, saved, input, weight, activation, needs)
    from fastmp.backends.triton.activation import activation_backward

    rows = _rows(grad).contiguous()
    with torch.cuda.device_of(grad):
        dz, db = activation_backward(
            rows, saved.contiguous().view(-1, rows.shape[1]), activation, needs[2]
        )
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

if triton.serves("linear", "products in fp16 and bf16, with an activation; others are torch's"):
    _library.impl("linear", linear_cuda, "CUDA")
    _library.impl("linear_backward", backward_cuda, "CUDA")
