"""Update rules by number: the struct in ``csrc/common/rules.h`` and the same in plain PyTorch.

The plain one is the oracle of the tests, and the fallback for dtypes and devices without a kernel.
It stands with the optimizer that uses it: ``fastmp.optim``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastmp.backends.abi import HYPER_FIELDS


class Hyperparameters(NamedTuple):
    """One group's hyperparameters, as ``fastmp_hyper`` in ``csrc/common/table.h`` lays them out."""

    rule: float
    lr: float
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    maximize: float = 0.0
    decoupled: float = 0.0
    nesterov: float = 0.0


assert Hyperparameters._fields == HYPER_FIELDS

#: (master, gradient, states, number of the step, hyperparameters) -> the new master.
Reference = Callable[[Tensor, Tensor, Sequence[Tensor], float, Hyperparameters], Tensor]
_Function = TypeVar("_Function", bound=Reference)


class Rule(NamedTuple):
    """An update rule: its struct in ``csrc/common/rules.h``, and its step in plain PyTorch."""

    struct: str
    reference: Reference


RULES: dict[int, Rule] = {}


def rule(number: int, struct: str) -> Callable[[_Function], _Function]:
    """Mark a function as the plain form of a rule; ``number`` and ``struct`` are those of rules.h.

    The function returns the new value of a tensor and changes its states in place.
    """

    def register(reference: _Function) -> _Function:
        assert number not in RULES, f"{struct} and {RULES[number].struct} are both rule {number}"
        RULES[number] = Rule(struct, reference)
        return reference

    return register
