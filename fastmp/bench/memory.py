"""Memory that a model takes in training, apart from activations: weights, gradients, state.

Counted on tensors without memory (the meta device), which the optimizers allocate as they do in
training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmp.amp import convert
from fastmp.optim import state
from fastmp.optim.base import FusedOptimizer

#: Weights and what completes them to fp32: name, dtype, ``master``.
WEIGHTS = (
    ("fp32", torch.float32, None),
    ("fp16", torch.float16, None),
    ("fp16 split", torch.float16, "split"),
    ("bf16", torch.bfloat16, None),
)
KINDS: dict[str, torch.dtype | str] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "8bit": "8bit",
}


class Memory(NamedTuple):
    """Bytes of a model with these ``WEIGHTS``, whose moments are kept as ``state_dtype``.

    Batch norms stay in fp32; ``average`` is what ``ema`` adds.
    """

    name: str
    state_dtype: str
    weights: int
    gradients: int
    masters: int
    moments: int
    average: int

    @property
    def total(self) -> int:
        """Without the average."""
        return self.weights + self.gradients + self.masters + self.moments


def table(model: nn.Module, make: type[FusedOptimizer]) -> Iterator[Memory]:
    """Every choice of dtypes for a model and an optimizer with its default options."""
    model = copy.deepcopy(model).to("meta")
    for name, dtype, master in WEIGHTS:
        converted = copy.deepcopy(model)
        if dtype != torch.float32:
            convert(converted, dtype)
        for kind_name, kind in KINDS.items():
            params = [p for p in converted.parameters() if p.requires_grad]
            optimizer = make(params, ema=0.999, state_dtype=kind, master=master)
            yield _memory(name, kind_name, optimizer, converted)


def _memory(name: str, kind: str, optimizer: FusedOptimizer, model: nn.Module) -> Memory:
    (group,) = optimizer.param_groups
    params, states = group["params"], optimizer.state
    keys = optimizer._state_keys(group)
    state.allocate(states, params, keys, optimizer._kind, split=optimizer._split)
    for param in params:
        states[param]["average"] = state.master_of(param, states[param])

    def of(*names: str) -> int:
        return sum(own[n].nbytes for own in states.values() for n in names if n in own)

    weights: list[Tensor] = [*model.parameters(), *model.buffers()]
    return Memory(
        name,
        kind,
        sum(t.nbytes for t in weights),
        sum(p.nbytes for p in params),
        of("master", "remainder", "remainder_fp16"),
        of(*keys, "scales"),
        of("average"),
    )
