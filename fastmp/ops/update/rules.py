"""Update rules by number, in plain PyTorch.

A rule is the oracle of the tests, and the fallback for dtypes and devices without a kernel. It
stands with the optimizer that uses it, in ``fastmp.optim``; ``csrc/common/rules.h`` has the rules
of the same numbers for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from fastmp.backends.abi import Hyperparameters
from fastmp.ops.update.state_kinds import Quantity

#: (master, gradient, states, number of the step, hyperparameters) -> the new master. The states
#: are changed in place.
Rule = Callable[[Tensor, Tensor, Sequence[Tensor], float, Hyperparameters], Tensor]
_Function = TypeVar("_Function", bound=Rule)

RULES: dict[int, Rule] = {}

#: What the states of a rule are, as ``quantity`` in the header; states past the end are signed.
QUANTITIES: dict[int, tuple[Quantity, ...]] = {}


def rule(number: int, *quantities: Quantity) -> Callable[[_Function], _Function]:
    """Mark a function as the rule of this number in ``csrc/common/rules.h``.

    Args:
        number: that of the header.
        quantities: what the states are; those not given have a sign.
    """

    def register(function: _Function) -> _Function:
        assert number not in RULES, f"two rules have the number {number}"
        RULES[number], QUANTITIES[number] = function, quantities
        return function

    return register
