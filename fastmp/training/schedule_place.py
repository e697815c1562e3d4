"""Where in its schedule a run is, when it goes on with another number of steps an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fastmp.schedule import Bindable, Schedule


@dataclass(frozen=True)
class Resumed(Bindable):
    """``schedule`` from ``place`` on at applied step ``start``, by ``rate`` of its steps a step."""

    schedule: Schedule
    start: int
    place: float
    rate: float

    @property
    def length(self) -> int | None:
        """Applied steps up to the last value of ``schedule``; None if that has no last."""
        length: int | None = getattr(self.schedule, "length", None)
        if length is None:
            return None
        return max(1, self.start + math.ceil((length - self.place) / self.rate))

    def __call__(self, step: int) -> tuple[float, float | None]:
        """(lr, momentum): of several steps of ``schedule`` in one, those of the last."""
        return self.schedule(max(0, round(self.place + (step - self.start + 1) * self.rate - 1)))


@dataclass
class SchedulePlace:
    """The place, saved with a run; by default the number of applied steps.

    After a change of the batch size, the passes or the ranks an epoch has ``steps_per_epoch`` steps
    of another size. The share of the run that is done stays what it is, so the rest of the epochs
    goes through the rest of the schedule.
    """

    start: int = 0
    place: float = 0.0
    rate: float = 1.0
    steps_per_epoch: int | None = None
    length: int | None = None  # of the schedule

    def follow(self, schedule: Schedule | None) -> Schedule | None:
        """``schedule`` by applied steps."""
        if schedule is None or (self.rate == 1.0 and self.place == self.start):
            return schedule
        return Resumed(schedule, self.start, self.place, self.rate)

    def move(self, steps_per_epoch: int | None, length: int | None, applied: int) -> None:
        """Go on after ``applied`` steps with this many an epoch, and a schedule of this length.

        A schedule of the old length is still in the old steps: several, or a part, a step. Another
        one was made for the new ones.
        """
        old = self.steps_per_epoch
        if old and steps_per_epoch and old != steps_per_epoch:
            ratio = steps_per_epoch / old
            place = self.place + (applied - self.start) * self.rate
            is_same = length is not None and length == self.length
            self.start = applied
            self.place, self.rate = (place, self.rate / ratio) if is_same else (place * ratio, 1.0)

    def load(self, saved: dict[str, Any]) -> None:
        """Take the values of another one, or the defaults."""
        for field in fields(self):
            setattr(self, field.name, saved.get(field.name, field.default))
