"""The linear layer with its activation as a function, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.functional.linear_autograd import hidden_of, linear_with_grad
from fastmp.ops import linear as operation
from fastmp.ops.checks import check_device, transformed
from fastmp.ops.linear import ACTIVATIONS, activate

# Device types for which torch.is_autocast_enabled raises. Dynamo of torch 2.11 cannot trace
# torch.amp.is_autocast_available.
_WITHOUT_AUTOCAST = frozenset({"meta", "lazy", "vulkan", "ve", "fpga"})


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``torch.nn.functional.linear`` and an activation in one operation.

    Sums are formed in fp32 and bias and activation applied to them before the one rounding;
    problems too small to gain from that go to torch's linear and activation. Follows
    ``torch.autocast`` as torch's linear does. Of two layers with gelu or silu between them, such as
    ``linear(linear(x, w1, b1, "gelu"), w2, b2)``, a GPU keeps one tensor of the hidden size for the
    backward in place of two.

    Args:
        input: (..., in_features), fp32, bf16, fp16 or fp64, of any strides.
        weight: (out_features, in_features), the dtype of ``input``.
        bias: (out_features), the dtype of ``input``, or None.
        activation: "none", "relu", "gelu" (``F.gelu``), "gelu_tanh" (``F.gelu`` with
            ``approximate="tanh"``) or "silu".

    Returns:
        (..., out_features), the dtype of ``input``.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit together; a second derivative
            through a nonlinear activation whose weight needs no gradient.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return _linear(input, weight, bias, activation, activation)


def linear_before(input: Tensor, weight: Tensor, bias: Tensor | None, following: str) -> Tensor:
    """``x Wᵀ + b`` for ``activate_after``; arguments and errors as those of ``linear``.

    Args:
        following: the activation that probably follows. No value depends on it.
    """
    return _linear(input, weight, bias, "none", following)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, following: str
) -> Tensor:
    # Exported programs hold torch's operations only, and nested tensors have rules for no others; a
    # vector as weight is rare, as are complex and whole numbers. The flag itself, since Dynamo of
    # torch 2.11 takes is_exporting() for true in everything that it compiles.
    if (
        weight.dim() != 2
        or (not weight.is_floating_point() and weight.dtype == input.dtype)
        or input.is_nested
        or transformed()
        or torch._C._get_tracing_state()
        or torch.compiler._is_exporting_flag
    ):
        return activate(F.linear(input, weight, bias), activation)
    input, weight, bias = autocast_operands(input, weight, bias)
    check_operands(input, weight, bias)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    hidden = hidden_of(input) if differentiable and weight.requires_grad else None
    if hidden is None and not operation.worthwhile(
        input, weight, following if differentiable else activation
    ):
        return activate(F.linear(input, weight, bias), activation)
    if differentiable:
        return linear_with_grad(input, weight, bias, activation, hidden)
    y: Tensor = torch.ops.fastmp.linear(input, weight, bias, activation, False)[0]
    return y


def autocast_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as ``torch.autocast`` has them, where it is on."""
    kind = input.device.type
    if kind in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    bias = None if bias is None else _autocast(bias, dtype)
    return _autocast(input, dtype), _autocast(weight, dtype), bias


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: every floating type but fp64."""
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def check_operands(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError unless shapes, dtypes and devices fit together."""
    out_features, in_features = weight.shape
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise RuntimeError(
            f"input must have the shape (..., {in_features}) for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating-point, got {input.dtype}; call .float()")
    if bias is not None and bias.shape != (out_features,):
        raise RuntimeError(f"bias must have the shape ({out_features},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name} must have the dtype of input ({input.dtype}), got {tensor.dtype}; convert "
                "one of them, e.g. fastmp.convert(model, dtype) or input.to(dtype)"
            )
        check_device(name, tensor, input.device)
