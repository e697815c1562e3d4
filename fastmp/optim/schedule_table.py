"""A schedule as a table: one row a step, read on the device by the number of applied steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmp.optim.options import norm_limit
from fastmp.schedule import Schedule, evaluate

Column = Sequence[float] | None
COLUMNS = ("lr", "momentum", "max_grad_norm")  # of a table, in this order


def tabulate(schedule: Schedule, steps: int | None) -> tuple[list[float], list[float] | None]:
    """The lr and the momentum of every step; None for a momentum that the schedule leaves alone.

    Args:
        schedule: (lr, momentum) of the number of applied steps.
        steps: how many; None: the schedule's own length.

    Raises:
        ValueError: no ``steps`` for a schedule without a length, or below 1; or a momentum that is
            None at some steps only.
    """
    if steps is None:
        steps = getattr(schedule, "length", None)
    if steps is None:
        raise ValueError(
            "expected the number of steps to bind, for this schedule has no length of its own: "
            f"bind(..., steps=...), got {schedule!r}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    lrs, momenta = zip(*(evaluate(schedule, step) for step in range(steps)), strict=True)
    unset = momenta.count(None)
    if unset not in (0, steps):
        raise ValueError(
            "the momentum of a schedule must be None at every step or at none, got None at "
            f"{unset} of {steps}"
        )
    return list(lrs), None if unset else list(momenta)


def build(lr: Sequence[float], momentum: Column, max_grad_norm: Column) -> Tensor:
    """The columns side by side, float64 (steps, 3); NaN: unset.

    Raises:
        ValueError: an empty table, columns of several lengths, a negative number or one that is
            not finite, or a ``max_grad_norm`` of 0.
    """
    steps = len(lr)
    if steps == 0:
        raise ValueError("lr: expected at least one step, got none")
    table = np.full((steps, len(COLUMNS)), np.nan)
    columns = zip(COLUMNS, (lr, momentum, max_grad_norm), strict=True)
    for i, (name, column) in enumerate(columns):
        if column is None:
            continue
        if len(column) != steps:
            raise ValueError(f"{name}: expected {steps} steps as for lr, got {len(column)}")
        table[:, i] = column
        if not (np.isfinite(table[:, i]) & (table[:, i] >= 0)).all():
            raise ValueError(f"{name}: expected finite numbers >= 0, got {list(column)}")
    if max_grad_norm is not None:
        norm_limit(min(max_grad_norm))
    return torch.from_numpy(table)


def is_set(table: Tensor, column: str) -> bool:
    """Whether a table has this column: at every step, or at none. Reads the table's device."""
    return not bool(table[0, COLUMNS.index(column)].isnan())


def check_momentum(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a momentum for groups that keep none.

    Raises:
        ValueError: a group with neither betas nor a momentum above 0.
    """
    if not all(group.get("betas") or group.get("momentum") for group in groups):
        raise ValueError(
            "the table has a momentum, but a parameter group has none: give the optimizer one "
            "above 0, so that it keeps a buffer for it"
        )
