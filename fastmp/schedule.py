"""Learning-rate schedules: pure functions of the number of applied optimizer steps.

``schedule(step)`` gives ``(lr, momentum)`` for the update that ``step`` applied ones came before;
momentum is None where the schedule leaves it alone. Nothing is remembered between calls, so a
skipped step cannot make a schedule drift, resuming needs nothing but the step, and every schedule
pickles. Steps past the end get the last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Schedule = Callable[[int], tuple[float, float | None]]


def scale_lr(
    lr: float,
    batch_size: int,
    base_batch_size: int = 256,
    rule: Literal["linear", "sqrt"] = "linear",
) -> float:
    """The learning rate for ``batch_size`` when ``lr`` suits ``base_batch_size``.

    "linear" (Goyal et al. 2017, arXiv:1706.02677) suits SGD; "sqrt" (Malladi et al. 2022,
    arXiv:2205.10287) suits Adam, whose update does not grow with the gradient.

    Raises:
        ValueError: a batch size below 1, a negative lr or an unknown rule.
    """
    _check_rate("lr", lr)
    _check(batch_size >= 1, "batch_size must be at least 1", batch_size)
    _check(base_batch_size >= 1, "base_batch_size must be at least 1", base_batch_size)
    _check(rule in ("linear", "sqrt"), "rule must be 'linear' or 'sqrt'", rule)
    ratio = batch_size / base_batch_size
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


@dataclass(frozen=True)
class Constant:
    """The same values at every step."""

    lr: float
    momentum: float | None = None

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        _check_momentum("momentum", self.momentum)

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        return self.lr, self.momentum


@dataclass(frozen=True)
class Warmup:
    """A straight line up to the first lr of ``schedule`` in ``steps`` steps, then ``schedule``.

    Step ``k`` of the warm-up has ``(k + 1) / (steps + 1)`` of that lr: no step is wasted at lr 0.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps >= 0, "steps must be at least 0", self.steps)

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        lr, momentum = self.schedule(max(0, step - self.steps))
        return lr * min(1.0, (step + 1) / (self.steps + 1)), momentum


@dataclass(frozen=True)
class OneCycle:
    """The one-cycle policy (Smith and Topin 2017, arXiv:1708.07120).

    The lr climbs from ``max_lr / div_factor`` to ``max_lr`` over the first ``pct_start`` of the
    steps, then falls to ``max_lr / div_factor / final_div_factor``; the momentum runs from
    ``max_momentum`` to ``base_momentum`` and back. With ``three_phase`` the fall mirrors the climb
    and a third phase leads down to the final lr. Give ``base_momentum=None`` to leave it alone.

    The values are those of ``torch.optim.lr_scheduler.OneCycleLR``, except where that divides by
    zero or steps off its ends: a climb of one step or less starts at the peak, and every step from
    ``total_steps - 1`` on has the final lr instead of an error.
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    base_momentum: float | None = 0.85
    max_momentum: float | None = 0.95
    three_phase: bool = False

    def __post_init__(self) -> None:
        _check_rate("max_lr", self.max_lr)
        _check(self.total_steps >= 1, "total_steps must be at least 1", self.total_steps)
        _check(self.anneal in ("cos", "linear"), "anneal must be 'cos' or 'linear'", self.anneal)
        _check(self.div_factor > 0, "div_factor must be above 0", self.div_factor)
        _check(self.final_div_factor > 0, "final_div_factor must be above 0", self.final_div_factor)
        limit = 0.5 if self.three_phase else 1.0
        _check(
            0 <= self.pct_start <= limit,
            f"pct_start must lie in [0, {limit}] with three_phase={self.three_phase}",
            self.pct_start,
        )
        _check_momentum("base_momentum", self.base_momentum)
        _check_momentum("max_momentum", self.max_momentum)
        _check(
            (self.base_momentum is None) == (self.max_momentum is None),
            "base_momentum and max_momentum must both be numbers or both be None",
            (self.base_momentum, self.max_momentum),
        )

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        top, bottom = self.max_lr, self.max_lr / self.div_factor
        final = bottom / self.final_div_factor
        last = self.total_steps - 1.0
        peak = min(max(self.pct_start * self.total_steps - 1.0, 0.0), last)
        # first step, last step, lr at both, momentum at both: 0 for the maximum, 1 for the base
        phases = [(0.0, peak, bottom, top, 0, 1), (peak, last, top, final, 1, 0)]
        if self.three_phase:
            foot = min(max(2 * self.pct_start * self.total_steps - 2.0, peak), last)
            phases[1:] = [(peak, foot, top, bottom, 1, 0), (foot, last, bottom, final, 0, 0)]
        here = min(float(step), last)
        start, end, lr_a, lr_b, a, b = next(phase for phase in phases if here <= phase[1])
        done = (here - start) / (end - start) if end > start else 1.0
        lr = self._between(lr_a, lr_b, done)
        if self.base_momentum is None or self.max_momentum is None:
            return lr, None
        ends = (self.max_momentum, self.base_momentum)
        return lr, self._between(ends[a], ends[b], done)

    def _between(self, start: float, end: float, done: float) -> float:
        if self.anneal == "linear":
            return start + (end - start) * done
        return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def apply(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """Write ``lr``, and ``momentum`` unless it is None, into every parameter group.

    Momentum goes where the optimizer keeps it: ``betas[0]`` for the Adam family, ``momentum`` for
    SGD. A tensor lr is filled in place, so that a captured graph sees the new value.

    Raises:
        ValueError: a momentum for an optimizer that has none.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = momentum
        else:
            raise ValueError(
                f"the schedule sets a momentum, but {type(optimizer).__name__} has neither 'betas' "
                "nor 'momentum'; use a schedule without momentum"
            )


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}, got {got!r}")


def _check_rate(name: str, value: float) -> None:
    _check(0 <= value < math.inf, f"{name} must be finite and at least 0", value)


def _check_step(step: int) -> None:
    _check(step >= 0, "step must be at least 0", step)


def _check_momentum(name: str, value: float | None) -> None:
    _check(value is None or 0 <= value < 1, f"{name} must lie in [0, 1)", value)
