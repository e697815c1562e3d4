"""transformers' activations and its ``Conv1D`` on fastmp's operations.

Imported for models that hold them. The classes of transformers' own forward stay base classes, so
that ``isinstance`` holds, and are found here by pickle.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastmp.functional.linear import linear_before
from fastmp.functional.linear_autograd import activate_after

for name in ("activate_after", "linear_before"):
    torch.fx.wrap(name)  # as in fastmp.nn

# Three of them compute the tanh form of gelu in five passes, each rounded to 16 bits.
_KINDS = {
    "GELUActivation": "gelu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",  # its name before transformers 5
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}


def _activation_forward(self: Any, input: Tensor) -> Tensor:
    """Any shape, fp32, bf16, fp16 or fp64, to the same."""
    return activate_after(input, self.kind)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    """``x W + b``, (..., nx) to (..., nf)."""
    return linear_before(x, self.weight.t(), self.bias, self.following)


def _subclasses() -> dict[type[nn.Module], type[nn.Module]]:
    """By the class of transformers; those that this version of it has."""
    found: dict[type[nn.Module], type[nn.Module]] = {}
    activations, layers = map(
        import_module, ("transformers.activations", "transformers.pytorch_utils")
    )
    for name, kind in _KINDS.items():
        theirs = getattr(activations, name, None)
        if theirs is not None and theirs not in found:
            fields = {"kind": kind, "forward": _activation_forward, "__module__": __name__}
            found[theirs] = type(theirs.__name__, (theirs,), fields)
    fields = {"following": "none", "forward": _conv1d_forward, "__module__": __name__}
    found[layers.Conv1D] = type("Conv1D", (layers.Conv1D,), fields)
    return found


#: Our class for each of theirs.
OURS = _subclasses()
globals().update({ours.__name__: ours for ours in OURS.values()})
