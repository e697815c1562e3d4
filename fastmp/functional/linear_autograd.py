"""The linear layer and its activation under autograd: what the graph keeps of them.

A layer keeps its input for the gradient of its weight, an activation keeps z. Where the input of a
layer is act(z) of a layer before it, as in the MLP of a transformer, it keeps that z instead: of
two tensors of the hidden size one is left. The backward computes act(z) again, in the pass over z
that the gradient of the activation takes, which writes 2 bytes an element more in 16 bits.

Layers and activations find each other by ``grad_fn`` when they are called. Where anything lies
between them (dropout, a norm, a gate) there is nothing to find. No value of the forward changes.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmp.backends.torch_linear import saves_preactivation
from fastmp.ops import linear as operation
from fastmp.ops.checks import transformed
from fastmp.ops.linear import activate, activation_gradient

# The pack hook of the first forward under torch.utils.checkpoint(use_reentrant=False).
_CHECKPOINT_HOOK = "torch.utils.checkpoint", "_checkpoint_hook.__init__.<locals>.pack_hook"


class Hidden(NamedTuple):
    """What a layer keeps in place of its input act(z)."""

    z: Tensor
    activation: str


class _Ahead(NamedTuple):
    """dz and db of a node, computed by the node that made its ``grad``."""

    grad: Tensor
    version: int
    dz: Tensor
    db: Tensor


class _Linear(torch.autograd.Function):
    """Saves the tensors that the requested gradients depend on, and no others."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        hidden: Hidden | None,
    ) -> Tensor:
        smooth, dropped = saves_preactivation(activation), _drops_saved_tensors()
        y, z = torch.ops.fastmp.linear(input, weight, bias, activation, not dropped)
        if smooth and dropped:  # a checkpoint compares number and shapes with its second forward
            z = y.new_empty(()).expand(y.shape)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        # The second derivative of a nonlinear layer needs both; a parameter costs no memory.
        keep_weight = needs_input or (needs_weight and activation != "none")
        kept = input if hidden is None else hidden.z
        ctx.save_for_backward(
            kept if needs_weight else None,
            weight if keep_weight else None,
            bias,
            y if activation == "relu" else z,
        )
        ctx.activation = activation
        ctx.shapes = input.shape, weight.shape
        ctx.input_activation = None if hidden is None else hidden.activation
        ctx.ahead = ctx.input = ctx.z = None
        if not torch.compiler.is_compiling():
            ctx.input = weakref.ref(input)
            if activation != "relu":
                ctx.z = weakref.ref(z if smooth else y)
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, activation = list(ctx.needs_input_grad[:3]), ctx.activation
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled():  # create_graph=True
            return (*_differentiable_backward(ctx, grad, needs), None, None)
        kept, weight, _, saved = ctx.saved_tensors
        recomputes, wanted = ctx.input_activation is not None, list(needs)
        done = _take_ahead(ctx, grad) if eager else None
        if done is None and recomputes and activation != "none":
            done = _activation_backward(grad, saved, activation, needs[2])
        if done is not None:
            (grad, db), activation, wanted[2] = done, "none", False
        if recomputes:
            dx, dw, own_db = _recomputing_backward(ctx, grad, kept, weight, wanted)
        else:
            # Of a tensor that was not saved the operation reads the shape only.
            input, weight = (
                grad.new_empty(()).expand(shape) if tensor is None else tensor
                for tensor, shape in zip((kept, weight), ctx.shapes, strict=True)
            )
            dx, dw, own_db = torch.ops.fastmp.linear_backward(
                grad, saved, input, weight, activation, wanted
            )
        grads = zip((dx, dw, own_db if done is None else db), needs, strict=True)
        return (*(g if need else None for g, need in grads), None, None)


class _Activation(torch.autograd.Function):
    """act of a linear layer's output; its backward finds the gradient of the bias in the pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: str, layer: Any) -> Tensor:
        y = activate(z, activation)
        ctx.save_for_backward(y if activation == "relu" else z)
        ctx.activation, ctx.layer, ctx.ahead = activation, layer, None
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
        done = _take_ahead(ctx, grad)
        dz, db = done or _activation_backward(grad, saved, ctx.activation, needs_bias)
        if needs_bias:
            ctx.layer.ahead = _Ahead(dz, dz._version, dz, db)
        return dz, None, None


def _activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dz and db."""
    dz, db, _ = torch.ops.fastmp.activation_backward(grad, saved, activation, needs_bias, False)
    return dz, db


_LINEAR_NODE: Any = _Linear._backward_cls
_ACTIVATION_NODE: Any = _Activation._backward_cls


def linear_with_grad(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, hidden: Hidden | None
) -> Tensor:
    """``fastmp::linear`` with its gradients.

    Args:
        input, weight, bias, activation: as for ``fastmp.functional.linear``, checked.
        hidden: ``hidden_of(input)``, to keep in place of the input.
    """
    y: Tensor = _Linear.apply(input, weight, bias, activation, hidden)  # type: ignore[no-untyped-call]
    return y


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


# ---- an input that is not kept ----


def hidden_of(input: Tensor) -> Hidden | None:
    """z and act where ``input`` is act(z) and the graph keeps z in any case.

    z is an output of ``_Linear``; act was applied there, by ``_Activation`` or by torch's own gelu
    and silu. Both tensors must be as they were made. Hooks on saved tensors take each tensor apart:
    nothing is gained then, and the two forwards of a checkpoint, which must keep the same, may
    differ in what is still there. A second derivative has to compute act(z) again with its history,
    for which a layer that applies act itself must have kept its input.
    """
    if torch.compiler.is_compiling() or input.grad_fn is None or input._version:
        return None
    node: Any = input.grad_fn
    activation = _activation_of(node)
    if activation is None or not operation.recomputes_input(input.device):
        return None
    if _saved_tensors_hooks() is not None:
        return None
    applies_itself = type(node) is _LINEAR_NODE
    layer = node if applies_itself else node.next_functions[0][0]
    if type(layer) is not _LINEAR_NODE:
        return None
    if not (layer.needs_input_grad[1] if applies_itself else layer.activation == "none"):
        return None
    z = layer.z and layer.z()
    return None if z is None or z._version else Hidden(z, activation)


def _activation_of(node: Any) -> str | None:
    """The activation whose result has this ``grad_fn``, if its derivative needs z."""
    if type(node) in (_LINEAR_NODE, _ACTIVATION_NODE):
        activation: str = node.activation
        return activation if saves_preactivation(activation) else None
    name = type(node).__name__
    if name == "GeluBackward0":
        return "gelu" if node._saved_approximate == "none" else "gelu_tanh"
    return "silu" if name == "SiluBackward0" else None


def _recomputing_backward(
    ctx: Any, grad: Tensor, z: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW and db of ``x Wᵀ + b`` with x = act(z), and for the node that made x its dz and db."""
    backward = torch.ops.fastmp.linear_backward
    only_shape = grad.new_empty(()).expand(z.shape)
    dx, _, _ = backward(grad, grad, only_shape, weight, "none", [True, False, False])
    node = ctx.next_functions[0][0]
    if type(node) in (_LINEAR_NODE, _ACTIVATION_NODE):
        layer = node if type(node) is _LINEAR_NODE else node.layer
        dz, db, input = torch.ops.fastmp.activation_backward(
            dx, z, ctx.input_activation, layer.needs_input_grad[2], True
        )
        node.ahead = _Ahead(dx, dx._version, dz, db)
    else:
        input = activate(z, ctx.input_activation)
    _, dw, db = backward(grad, grad, input, weight, "none", [False, *needs[1:]])
    return dx, dw, db


def _take_ahead(node: Any, grad: Tensor) -> tuple[Tensor, Tensor] | None:
    """dz and db that an earlier backward left for the node, if they fit this gradient.

    They do not where the output of the node was used elsewhere too, or a hook changed the gradient.
    """
    ahead, node.ahead = node.ahead, None
    if ahead is None or ahead.grad is not grad or ahead.version != grad._version:
        return None
    return ahead.dz, ahead.db


def _saved_tensors_hooks() -> Any:
    """The pack and unpack hooks that the next saved tensor gets, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _drops_saved_tensors() -> bool:
    """Whether this is the first forward of a checkpoint, which keeps nothing for the backward.

    Under a dispatch mode it is not: that of a selective checkpoint keeps results of operations.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    hooks = _saved_tensors_hooks()
    if hooks is None:
        return False
    return (hooks[0].__module__, getattr(hooks[0], "__qualname__", "")) == _CHECKPOINT_HOOK


# ---- second derivatives ----


def _differentiable_backward(ctx: Any, grad: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """The gradients in plain PyTorch, differentiable in every tensor that they depend on."""
    kept, weight, bias, _ = ctx.saved_tensors
    input = _with_history(ctx, kept)
    if ctx.activation == "none":  # no gradient depends on a tensor that was not saved
        input, weight = (
            grad.new_zeros(shape, requires_grad=True) if tensor is None else tensor
            for tensor, shape in zip((input, weight), ctx.shapes, strict=True)
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


def _with_history(ctx: Any, kept: Tensor) -> Tensor:
    """The input of a layer: itself, or computed again where z was kept in its place."""
    if ctx.input_activation is None:
        return kept
    input = ctx.input()
    if input is not None and not input._version:  # its own gradient may be asked for
        return cast(Tensor, input)
    node = ctx.next_functions[0][0]
    if type(node) is not _LINEAR_NODE:
        return activate(kept, ctx.input_activation)
    kept, weight, bias, _ = node.saved_tensors
    return activate(F.linear(_with_history(node, kept), weight, bias), node.activation)
