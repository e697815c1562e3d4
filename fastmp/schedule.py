"""Learning-rate schedules: pure functions of the number of applied optimizer steps.

``schedule(step)`` gives ``(lr, momentum)`` of the update after ``step`` applied ones; momentum is
None where the schedule leaves it unchanged. A schedule has no state: a skipped step cannot make it
drift, resuming needs the step alone, and every schedule pickles. Steps past the end get the last
value.

Three ways to apply one: ``bind`` writes it onto the device, for a fastmp optimizer;
``fastmp.optim.lr_scheduler.apply`` writes one step into the groups of any optimizer;
``fastmp.optim.lr_scheduler.LRScheduler`` is for loops written around torch's schedulers, where the
number may also be that of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Callable[[int], tuple[float, float | None]]


def evaluate(schedule: Schedule, step: int) -> tuple[float, float | None]:
    """``schedule(step)`` in Python's numbers, where it computes with NumPy's or with tensors."""
    lr, momentum = schedule(step)
    return float(lr), None if momentum is None else float(momentum)


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
    _check_rates(lr=lr)
    _check_counts(batch_size=batch_size, base_batch_size=base_batch_size)
    _check(rule in ("linear", "sqrt"), "rule must be 'linear' or 'sqrt'", rule)
    ratio = batch_size / base_batch_size
    return float(lr * (ratio if rule == "linear" else math.sqrt(ratio)))


class Bindable:
    """The base class of the schedules: functions of the step that an optimizer can be bound to."""

    @property
    def length(self) -> int | None:
        """Steps up to the last value, that one included; None if there is no last."""
        raise NotImplementedError

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum) of the update after ``step`` applied ones."""
        raise NotImplementedError

    def bind(self, optimizer: Any, steps: int | None = None) -> None:
        """Have a fastmp optimizer apply this schedule on the device.

        The same as ``optimizer.bind_schedule(self, steps)``; arguments and errors as there.

        Raises:
            TypeError: an optimizer that is not fastmp's.
        """
        if not hasattr(optimizer, "bind_schedule"):
            raise TypeError(
                "only an optimizer from fastmp.optim applies a schedule on the device, got "
                f"{type(optimizer).__name__}; for others use fastmp.optim.lr_scheduler.LRScheduler"
            )
        optimizer.bind_schedule(self, steps)


@dataclass(frozen=True)
class Constant(Bindable):
    """The same ``lr`` and ``momentum`` (None: the optimizer's own) at every step.

    Raises:
        ValueError: an lr that is negative or not finite, a momentum outside [0, 1).
    """

    lr: float
    momentum: float | None = None

    def __post_init__(self) -> None:
        _check_rates(lr=self.lr)
        _check_momentum("momentum", self.momentum)

    @property
    def length(self) -> int:
        """1."""
        return 1

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        return self.lr, self.momentum


@dataclass(frozen=True)
class Cosine(Bindable):
    """Half a cosine from ``lr`` to ``final_lr`` (Loshchilov and Hutter 2016, arXiv:1608.03983).

    The lr after ``k`` steps is ``final_lr + (lr - final_lr) (1 + cos(pi k / total_steps)) / 2``:
    that of torch's ``CosineAnnealingLR(T_max=total_steps, eta_min=final_lr)``. All ``total_steps``
    steps lie above ``final_lr``, so none is wasted if that is 0; every later one has
    ``final_lr``, where torch's climbs again. ``momentum`` is constant; None: the optimizer's own.

    Raises:
        ValueError: a number outside its range; the message names the range.
    """

    lr: float
    total_steps: int
    final_lr: float = 0.0
    momentum: float | None = None

    def __post_init__(self) -> None:
        _check_rates(lr=self.lr, final_lr=self.final_lr)
        _check_counts(total_steps=self.total_steps)
        _check_momentum("momentum", self.momentum)

    @property
    def length(self) -> int:
        """``total_steps`` and the final value."""
        return self.total_steps + 1

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        return _cosine(self.lr, self.final_lr, min(step / self.total_steps, 1.0)), self.momentum


@dataclass(frozen=True)
class Cyclic(Bindable):
    """Up and down between two rates, without end (Smith 2015, arXiv:1506.01186).

    The lr climbs from ``base_lr`` to ``max_lr`` in ``step_size_up`` steps and falls back in
    ``step_size_down`` (None: as many), in straight lines. With the ``mode`` "triangular" the height
    of the peaks above ``base_lr`` is constant, with "triangular2" it halves with every cycle, with
    "exp_range" it is multiplied by ``gamma`` with every step. The momentum runs the other way, from
    ``max_momentum`` down towards ``base_momentum`` at the peaks, in proportion to their height;
    None, both of them, leaves it unchanged. The values are those of
    ``torch.optim.lr_scheduler.CyclicLR``.

    Raises:
        ValueError: a number outside its range; the message names the range.
    """

    base_lr: float
    max_lr: float
    step_size_up: int = 2000
    step_size_down: int | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    base_momentum: float | None = None
    max_momentum: float | None = None

    def __post_init__(self) -> None:
        rates = (self.base_lr, self.max_lr)
        _check_rates(base_lr=self.base_lr, max_lr=self.max_lr)
        _check(self.base_lr <= self.max_lr, "base_lr must be at most max_lr", rates)
        _check_counts(step_size_up=self.step_size_up)
        _check(
            self.step_size_down is None or self.step_size_down >= 1,
            "step_size_down must be at least 1, or None",
            self.step_size_down,
        )
        modes = ("triangular", "triangular2", "exp_range")
        _check(self.mode in modes, f"mode must be one of {', '.join(modes)}", self.mode)
        _check(0 < self.gamma <= 1, "gamma must lie in (0, 1]", self.gamma)
        _check_momenta(self.base_momentum, self.max_momentum)

    @property
    def length(self) -> None:
        """None: without end."""
        return None

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        up = self.step_size_up
        down = self.step_size_down or up
        cycle, offset = divmod(step, up + down)  # integers: feet and peaks are exact
        height = offset / up if offset <= up else (up + down - offset) / down
        if self.mode == "triangular2":
            height *= 0.5**cycle
        elif self.mode == "exp_range":
            height *= self.gamma**step
        lr = self.base_lr + (self.max_lr - self.base_lr) * height
        if self.base_momentum is None or self.max_momentum is None:
            return lr, None
        return lr, self.max_momentum - (self.max_momentum - self.base_momentum) * height


@dataclass(frozen=True)
class Warmup(Bindable):
    """A straight line up to the first lr of ``schedule`` in ``steps`` steps, then ``schedule``.

    Goyal et al. 2017 (arXiv:1706.02677). Step ``k`` of the warm-up has ``(k + 1) / (steps + 1)`` of
    that lr: no step is wasted at lr 0. The momentum is that of ``schedule``'s first step.

    Raises:
        ValueError: ``steps`` below 0.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        _check(self.steps >= 0, "steps must be at least 0", self.steps)

    @property
    def length(self) -> int | None:
        """``steps`` and the length of ``schedule``; None if that has none."""
        length = getattr(self.schedule, "length", None)
        return None if length is None else self.steps + int(length)

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum)."""
        _check_step(step)
        lr, momentum = self.schedule(max(0, step - self.steps))
        return lr * min(1.0, (step + 1) / (self.steps + 1)), momentum


@dataclass(frozen=True)
class OneCycle(Bindable):
    """The one-cycle policy (Smith and Topin 2017, arXiv:1708.07120).

    The lr climbs from ``max_lr / div_factor`` to ``max_lr`` over the first ``pct_start`` of the
    steps, in a line or half a cosine (``anneal``), then falls to ``max_lr / div_factor /
    final_div_factor``; the momentum runs from ``max_momentum`` to ``base_momentum`` and back. With
    ``three_phase`` the fall mirrors the climb and a third phase leads down to the final lr. Give
    ``base_momentum=None`` to leave it unchanged.

    The values are those of ``torch.optim.lr_scheduler.OneCycleLR``, except where that divides by
    zero or steps off its ends: a climb of one step or less starts at the peak, and every step from
    ``total_steps - 1`` on has the final lr instead of an error.

    Raises:
        ValueError: a number outside its range; the message names the range.
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
        _check_rates(max_lr=self.max_lr)
        _check_counts(total_steps=self.total_steps)
        _check(self.anneal in ("cos", "linear"), "anneal must be 'cos' or 'linear'", self.anneal)
        _check(self.div_factor > 0, "div_factor must be above 0", self.div_factor)
        _check(self.final_div_factor > 0, "final_div_factor must be above 0", self.final_div_factor)
        limit = 0.5 if self.three_phase else 1.0
        _check(
            0 <= self.pct_start <= limit,
            f"pct_start must lie in [0, {limit}] with three_phase={self.three_phase}",
            self.pct_start,
        )
        _check_momenta(self.base_momentum, self.max_momentum)

    @property
    def length(self) -> int:
        """``total_steps``."""
        return self.total_steps

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
        now = min(float(step), last)
        start, end, lr_a, lr_b, a, b = next(phase for phase in phases if now <= phase[1])
        done = (now - start) / (end - start) if end > start else 1.0
        lr = self._between(lr_a, lr_b, done)
        if self.base_momentum is None or self.max_momentum is None:
            return lr, None
        ends = (self.max_momentum, self.base_momentum)
        return lr, self._between(ends[a], ends[b], done)

    def _between(self, start: float, end: float, done: float) -> float:
        if self.anneal == "linear":
            return start + (end - start) * done
        return _cosine(start, end, done)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}, got {got!r}")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        _check(0 <= rate < math.inf, f"{name} must be finite and at least 0", rate)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        _check(count >= 1, f"{name} must be at least 1", count)


def _check_step(step: int) -> None:
    _check(step >= 0, "step must be at least 0", step)


def _check_momentum(name: str, value: float | None) -> None:
    _check(value is None or 0 <= value < 1, f"{name} must lie in [0, 1)", value)


def _check_momenta(base: float | None, top: float | None) -> None:
    _check_momentum("base_momentum", base)
    _check_momentum("max_momentum", top)
    _check(
        (base is None) == (top is None),
        "base_momentum and max_momentum must both be numbers or both be None",
        (base, top),
    )
