"""The linear layer with its activation as a function, differentiable any number of times."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.ops import linear as operation
from fastmp.ops.checks import check_device, transformed
from fastmp.ops.linear import ACTIVATIONS, activate, activation_gradient

# Device types for which torch.is_autocast_enabled raises. Dynamo of torch 2.11 cannot trace
# torch.amp.is_autocast_available.
_WITHOUT_AUTOCAST = frozenset({"meta", "lazy", "vulkan", "ve", "fpga"})


class _Linear(torch.autograd.Function):
    """Saves the tensors that the requested gradients depend on, and no others."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
    ) -> Tensor:
        y, z = torch.ops.fastmp.linear(input, weight, bias, activation, True)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        saved = y if activation == "relu" else z
        # The second derivative of a nonlinear layer needs both; a parameter costs no memory.
        keep_weight = needs_input or (needs_weight and activation != "none")
        ctx.save_for_backward(
            input if needs_weight else None, weight if keep_weight else None, bias, saved
        )
        ctx.activation = activation
        ctx.bias_gradient = None
        ctx.shapes = input.shape, weight.shape
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            return (*_differentiable_backward(ctx, grad, needs), None)
        db = None if torch.compiler.is_compiling() else _Activation.bias_gradient(ctx, grad)
        needs[2] = needs[2] and db is None
        input, weight, _, saved = ctx.saved_tensors
        # Of a tensor that was not saved the operation reads the shape only.
        input, weight = (
            grad.new_empty(()).expand(shape) if kept is None else kept
            for kept, shape in zip((input, weight), ctx.shapes, strict=True)
        )
        grads = torch.ops.fastmp.linear_backward(grad, saved, input, weight, ctx.activation, needs)
        dx, dw, own_db = (g if need else None for g, need in zip(grads, needs, strict=True))
        return dx, dw, own_db if db is None else db, None


class _Activation(torch.autograd.Function):
    """act of a linear layer's output; its backward finds the gradient of the bias in the pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: str, layer: Any) -> Tensor:
        y = activate(z, activation)
        ctx.save_for_backward(y if activation == "relu" else z)
        ctx.activation, ctx.layer = activation, layer
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.activation != "relu":  # create_graph=True
            z = saved.view_as(saved)
            y = activate(z, ctx.activation)
            return (*torch.autograd.grad(y, z, grad, create_graph=True), None, None)
        if torch.is_grad_enabled() or transformed(grad):
            return activation_gradient(grad, saved, ctx.activation), None, None
        needs_bias = ctx.layer.needs_input_grad[2]
        dz, db = torch.ops.fastmp.activation_backward(grad, saved, ctx.activation, needs_bias)
        if needs_bias:
            ctx.layer.bias_gradient = dz, dz._version, db
        return dz, None, None

    @staticmethod
    def bias_gradient(layer: Any, grad: Tensor) -> Tensor | None:
        """What the backward of the activation left for its layer, if it fits this gradient.

        It does not where the output of the layer was used elsewhere too, or a hook changed the
        gradient.
        """
        left, layer.bias_gradient = layer.bias_gradient, None
        if left is None or left[0] is not grad or left[1] != grad._version:
            return None
        return cast(Tensor, left[2])


def activate_after(z: Tensor, activation: str) -> Tensor:
    """act(z); where ``linear_before`` made z, the two have one pass less backward.

    Args:
        z: any shape, floating.
        activation: one of ``ACTIVATIONS``, not none.

    Returns:
        torch's values, in the shape and dtype of z.
    """
    if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
        layer = cast(Any, z.grad_fn)
        if (
            type(layer) is _LINEAR_NODE
            and layer.activation == "none"
            and operation.worthwhile_after(z, activation)
            and not transformed()
        ):
            y: Tensor = _Activation.apply(z, activation, layer)  # type: ignore[no-untyped-call]
            return y
    return activate(z, activation)


_LINEAR_NODE: Any = _Linear._backward_cls


def _differentiable_backward(ctx: Any, grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """The gradients in plain PyTorch, differentiable in every tensor that they depend on."""
    input, weight, bias, _ = ctx.saved_tensors
    if ctx.activation == "none":  # no gradient depends on a tensor that was not saved
        input, weight = (
            grad.new_zeros(shape, requires_grad=True) if kept is None else kept
            for kept, shape in zip((input, weight), ctx.shapes, strict=True)
        )
    if input is None or weight is None:
        raise RuntimeError(
            f"the second derivative of fastmp's linear with activation {ctx.activation!r} needs "
            "the input, which was not saved because the weight has requires_grad=False; "
            "use torch.nn.functional.linear and the activation here"
        )
    with torch.enable_grad():
        # Views: a gradient must not reach one of them through the history of another.
        input, weight = input.view_as(input), weight.view_as(weight)
        bias = None if bias is None else bias.view_as(bias)
        y = activate(F.linear(input, weight, bias), ctx.activation)
        wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needs]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``torch.nn.functional.linear`` and an activation in one operation.

    Sums are formed in fp32 and bias and activation applied to them before the one rounding;
    problems too small to gain from that go to torch's linear and activation. Follows
    ``torch.autocast`` as torch's linear does.

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
    if not operation.worthwhile(input, weight, following if differentiable else activation):
        return activate(F.linear(input, weight, bias), activation)
    if differentiable:
        y: Tensor = _Linear.apply(input, weight, bias, activation)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.fastmp.linear(input, weight, bias, activation, False)[0]
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
