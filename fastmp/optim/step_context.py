"""Inputs of an optimizer's step that are set from outside: by a scaler, by a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastmp.ops.update import Options


class ReducedStep(NamedTuple):
    """A step whose gradients are split over ranks, after an exchange.

    Attributes:
        options: the same on all ranks.
        grad_norm: over the gradients of all ranks.
        first_nonfinite: param_index of the first gradient that is not finite on any rank; -1: none.
    """

    options: Options
    grad_norm: Tensor
    first_nonfinite: Tensor


#: (gradients, their param_index, options of this rank) -> the step of all ranks.
StepReducer = Callable[[Sequence[Tensor], Sequence[int], Options], ReducedStep]


@dataclass
class StepContext:
    """Inputs of a step that are set from outside.

    Attributes:
        grad_scale: the loss scale that the gradients carry; set by a scaler, for one step.
        found_inf: non-zero skips the step; set by a scaler, for one step.
        reduce_step: set where each rank has a part of every parameter.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    reduce_step: StepReducer | None = None
