"""A linear layer with its activation, forward and backward.

::

    z = x Wᵀ + b        y = act(z)
    dz = dy · act'(z)   dx = dz W   dW = dzᵀ x   db = Σ_rows dz

act is none, relu, gelu, gelu_tanh or silu, as ``torch.nn.functional`` defines them. The backward
needs z for the last three and y for relu; z is computed and kept only then.

Where a backend's own product is the fastest one, bias and activation are applied to its sums in
fp32 before they are rounded. Elsewhere the product is torch's, followed by a pass for the
activation. The backward of activation and bias is one pass in both cases.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends import registry, torch_linear
from fastmp.backends.abi import ACTIVATION_CODES
from fastmp.backends.torch_linear import as_rows, saves_preactivation

ACTIVATIONS = tuple(ACTIVATION_CODES)


def worthwhile(input: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether the operation beats torch's linear followed by the activation on this device."""
    return registry.ask(
        "linear", "worthwhile", input.device, input, weight, activation, default=True
    )


def worthwhile_after(z: Tensor, activation: str) -> bool:
    """Whether one backward pass for activation and bias beats torch's two on this device."""
    return registry.ask("activation_backward", "worthwhile", z.device, activation, default=True)


def recomputes_input(device: torch.device) -> bool:
    """Whether act(z) is computed again in the backward where z is kept anyway."""
    return registry.ask("activation_backward", "recomputes", device, default=True)


# ---- reference: plain PyTorch, any floating dtype, any device ----


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z), by torch's own functions."""
    if activation == "none":
        return z
    if activation.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"relu": F.relu, "silu": F.silu}[activation](z)


def activation_gradient(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    """dy · act'(z), by torch's own functions, differentiable; saved is z, or y for relu."""
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
    z = torch_linear.product(input, weight, bias)
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
    dz = as_rows(activation_gradient(grad, saved, activation))
    dx, dw = torch_linear.product_gradients(dz, input, weight, needs)
    db = dz.sum(0) if needs[2] else grad.new_empty(0)
    return dx, dw, db


def activation_backward_reference(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, needs_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::activation_backward`` in plain PyTorch: that of the activation alone.

    Args:
        grad: dy, (..., out_features).
        saved: z, or y for relu, of the same shape.
        activation: one of ``ACTIVATIONS``, not none.
        needs_bias: whether to compute db.
        needs_output: whether to compute act(saved) again, which was not kept.

    Returns:
        dz in the shape and dtype of ``grad``; db (out_features) and y in the shape of ``grad``, or
        an empty tensor for each that is not needed.
    """
    dz = activation_gradient(grad, saved, activation)
    db = as_rows(dz).sum(0) if needs_bias else grad.new_empty(0)
    return dz, db, activate(saved, activation) if needs_output else grad.new_empty(0)


# ---- schema and fakes ----


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


def _activation_backward_fake(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, needs_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    db = grad.new_empty(grad.shape[-1] if needs_bias else 0)
    return torch.empty_like(grad), db, grad.new_empty(grad.shape if needs_output else 0)


registry.define(
    "linear",
    registry.TorchOp(
        "linear(Tensor input, Tensor weight, Tensor? bias, str activation, bool save) "
        "-> (Tensor, Tensor)",
        linear_reference,
        _linear_fake,
    ),
    registry.TorchOp(
        "linear_backward(Tensor grad, Tensor saved, Tensor input, Tensor weight, str activation, "
        "bool[3] needs) -> (Tensor, Tensor, Tensor)",
        backward_reference,
        _backward_fake,
    ),
    registry.TorchOp(
        "activation_backward(Tensor grad, Tensor saved, str activation, bool needs_bias, "
        "bool needs_output) -> (Tensor, Tensor, Tensor)",
        activation_backward_reference,
        _activation_backward_fake,
    ),
)
