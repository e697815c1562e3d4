"""Inputs of an optimizer's step that are set from outside: by a scaler, by a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmp.ops.update import Options


class LocalStep(NamedTuple):
    """A step as one rank sees it, before an exchange.

    Attributes:
        grads: of this rank's parts; empty where it has none.
        param_indices: of the gradients.
        param_count: parameters of the optimizer, with and without a gradient.
        options: of this rank.
        applied: applied steps so far, 0-d int64: the row of ``options.schedule``.
        device: of the parameters.
    """

    grads: Sequence[Tensor]
    param_indices: Sequence[int]
    param_count: int
    options: Options
    applied: Tensor
    device: torch.device


class ReducedStep(NamedTuple):
    """A step whose gradients are split over ranks, after an exchange.

    Attributes:
        options: the same on all ranks.
        grad_norm: over the gradients of all ranks.
        first_nonfinite: param_index of the first gradient that is not finite on any rank; -1: none,
            or the kernel's own finding counts.
        grad_count: gradients of all ranks.
    """

    options: Options
    grad_norm: Tensor
    first_nonfinite: Tensor
    grad_count: Tensor


#: The step of all ranks; None where it needs neither norm nor check.
StepReducer = Callable[[LocalStep], ReducedStep | None]


@dataclass
class StepContext:
    """Inputs of a step that are set from outside.

    Attributes:
        grad_scale: the loss scale that the gradients carry; set by a scaler, for one step.
        found_inf: non-zero skips the step; set by a scaler, for one step.
        reduce_step: set where each rank has a part of the parameters.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    reduce_step: StepReducer | None = None
