"""Linear layers, activations and the ``Sequential`` around them in fastmp's classes.

Each module stays where it is and computes what torch's computes: the layer ``x Wᵀ + b``, the
activation ``act(z)``. Two that follow each other find each other at the call, or do not: so either
can be wrapped, replaced, hooked or called alone. In a ``Sequential`` the loop sees that nothing
else gets the value in between, and makes one operation of both. Elsewhere the activation sees from
the history of its input that a layer made it: the gradients of activation and bias are one pass.
A layer sees in the same way that an activation made its input, and keeps z in place of it.

transformers' activations and its ``Conv1D`` take part, in subclasses of theirs.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastmp.nn import ACTIVATION_MODULES, GELU, Linear, ReLU, Sequential, SiLU

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
    nn.Sequential: Sequential,
}


def fuse_linear(model: nn.Module) -> nn.Module:
    """Give linear layers, activations and ``Sequential`` fastmp's classes, in place.

    Modules and parameters stay the same objects with the same hooks, and ``state_dict`` keys do not
    change. Subclasses, parametrized layers and modules from ``torch.compile`` or ``torch.jit`` are
    left alone.

    Args:
        model: any module.

    Returns:
        The same module.
    """
    modules, classes = _open_modules(model), _classes()
    for module in modules:
        ours = classes.get(type(module))
        if ours not in (None, Sequential) and _is_real(getattr(module, "weight", None)):
            module.__class__ = ours  # as torch's parametrize does: same object, same hooks
    replaced = frozenset(classes.values())
    for parent in modules:
        children: list[Any] = [m for m in parent._modules.values() if type(m) in replaced]
        following = next((m.kind for m in children if hasattr(m, "kind")), "none")
        for child in children:
            if hasattr(child, "following"):
                child.following = following
        in_turn = pairwise(parent._modules.values())
        pairs = any(type(a) is Linear and type(b) in ACTIVATION_MODULES for a, b in in_turn)
        if pairs and type(parent) is nn.Sequential:
            parent.__class__ = Sequential
    return model


def unfuse_linear(model: nn.Module) -> nn.Module:
    """Undo ``fuse_linear``, in place; a ``fastmp.nn.Linear`` with an activation stays.

    Args:
        model: any module.

    Returns:
        The same module.
    """
    torchs = {ours: theirs for theirs, ours in _classes().items()}
    for module in model.modules():
        if type(module) in torchs and getattr(module, "activation", "none") == "none":
            for name in ("activation", "following"):
                vars(module).pop(name, None)
            module.__class__ = torchs[type(module)]
    return model


def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Ours by the class that they replace; those of transformers where it is in use."""
    if "transformers.activations" not in sys.modules:
        return _OURS
    from fastmp.amp import hugging_face

    return _OURS | hugging_face.OURS


def _open_modules(model: nn.Module) -> list[nn.Module]:
    """Without compiled and scripted modules, their descendants, and patched forwards."""
    closed = {inner for m in model.modules() if _is_closed(m) for inner in m.modules()}
    return [m for m in model.modules() if m not in closed and "forward" not in vars(m)]


def _is_closed(module: nn.Module) -> bool:
    # torch.compile's wrapper by its attribute: importing its class costs a second.
    return isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules


def _is_real(weight: Tensor | None) -> bool:
    """Whether the operation supports such a weight: not complex, no subclass of torch's types."""
    if weight is None:
        return True
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
