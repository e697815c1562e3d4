"""A schedule that the device follows by applied steps, and rates beside it that are not used."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmp.backends.registry import on_host
from fastmp.optim import schedule_table
from fastmp.optim.step_record import RecordedOptimizer
from fastmp.schedule import Schedule


class ScheduledOptimizer(RecordedOptimizer):
    """Hyperparameters from a table instead of the groups'."""

    _schedule: Tensor | None = None
    _group_rates: Sequence[Any] = ()  # of the groups when the table was set
    _group_momenta: Sequence[Any] = ()  # likewise; empty: the table has none
    _warned_of_rates = False

    def bind_schedule(self, schedule: Schedule, steps: int | None = None) -> None:
        """Follow ``schedule`` on the device, by applied steps; see ``set_schedule``.

        Args:
            schedule: (lr, momentum) of the number of applied steps.
            steps: length of the table, from applied step 0 on; later steps have its last values.
                None: the schedule's own; ``Cyclic`` and plain functions have none.

        Raises:
            ValueError: no ``steps`` for a schedule without a length, or below 1; or a momentum that
                is None at some steps only, or that a group cannot use.
        """
        self.set_schedule(*schedule_table.tabulate(schedule, steps))

    def set_schedule(
        self,
        lr: Sequence[float],
        momentum: Sequence[float] | None = None,
        max_grad_norm: Sequence[float] | None = None,
    ) -> None:
        """Take hyperparameters from a table, by the number of applied steps.

        The step after k applied ones takes entry k; past the end, the last one. The table lies in
        the memory of the parameters' device: skipped steps do not shift it, and a replayed CUDA
        graph follows it. ``lr`` of the groups is then not read, and a warning says so if it is
        changed: every group takes the table's, times its ``lr_scale`` if it has one. A group whose
        ``lr`` is set to 0 stands still. Another table replaces this one. Capture graphs after this
        call.

        Args:
            lr: one for each step.
            momentum: likewise, for SGD's momentum or the first of the betas; None: the groups' own.
            max_grad_norm: likewise, the norm to clip to, above 0; None: the optimizer's own.

        Raises:
            ValueError: an empty table, columns of several lengths, a negative number or one that is
                not finite, or a momentum that a group cannot use.
        """
        built = schedule_table.build(lr, momentum, max_grad_norm)
        if momentum is not None:
            schedule_table.check_momentum(self.param_groups)
        self._schedule = built
        self.accept_group_rates()
        self._warn_of_group_rates()

    def clear_schedule(self) -> None:
        """Go back to the hyperparameters of the groups."""
        self._schedule = None

    def lr_after(self, applied: int) -> float:
        """The lr of the first group in the step after ``applied`` ones; reads the device."""
        group, table = self.param_groups[0], self._schedule
        if table is None:
            return float(group["lr"])
        return float(table[min(applied, len(table) - 1), 0]) * float(group.get("lr_scale", 1.0))

    def accept_group_rates(self) -> None:
        """The groups' ``lr`` are to be as they are now: beside a table they are for show.

        So is their momentum, where the table has one.
        """
        self._group_rates = [_seen(group["lr"]) for group in self.param_groups]
        schedule = self._schedule
        replaced = schedule is not None and schedule_table.is_set(schedule, "momentum")
        self._group_momenta = list(map(_momentum, self.param_groups)) if replaced else []

    def _warn_of_group_rates(self) -> None:
        """Once: the groups' rates are set, by a scheduler say, while a table is followed.

        Or their momentum is, and the table has one.
        """
        if self._warned_of_rates or self._schedule is None:
            return
        known = zip(self.param_groups, self._group_rates, strict=False)
        changed = any(_seen(group["lr"]) != seen and not _is_zero(group) for group, seen in known)
        momenta = zip(self.param_groups, self._group_momenta, strict=False)
        # torch's schedulers put a wrapper around the step of their optimizer
        changed = changed or hasattr(self.step, "_wrapped_by_lr_sched")
        if changed or any(_momentum(group) != seen for group, seen in momenta):
            self._warned_of_rates = True
            name = "lr" if changed else "momentum"
            warnings.warn(
                "a schedule is bound to this optimizer, and a scheduler, or other code, sets the "
                f"{name} of its groups: the {name} in the groups is shown, that of the bound "
                "schedule is used. Leave the scheduler out, or call clear_schedule() to use the "
                f"groups' {name}",
                UserWarning,
                stacklevel=4,
            )

    def _lr(self, group: dict[str, Any]) -> float:
        """A group's lr, its factor if there is a schedule, 0 if the lr is in device memory."""
        if self._schedule is not None:
            return 0.0 if self._stands_still(group) else float(group.get("lr_scale", 1.0))
        lr = group["lr"]
        return float(lr) if not isinstance(lr, Tensor) or on_host(lr) else 0.0

    def _stands_still(self, group: dict[str, Any]) -> bool:
        """Whether its lr was set to 0 beside a table: ``torch.distributed.checkpoint`` does so for
        a step that only allocates state."""
        if not _is_zero(group):
            return False
        known = zip(self.param_groups, self._group_rates, strict=False)
        return any(g is group and seen != _seen(group["lr"]) for g, seen in known)

    def _schedule_on(self, device: torch.device) -> Tensor | None:
        if self._schedule is not None and self._schedule.device != device:
            self._schedule = self._schedule.to(device)
        return self._schedule


def _seen(lr: float | Tensor) -> Any:
    """Equal as long as ``lr`` is the same; of a tensor without reading it."""
    return (id(lr), lr._version) if isinstance(lr, Tensor) else lr


def _momentum(group: dict[str, Any]) -> Any:
    return _seen(group["betas"][0] if "betas" in group else group["momentum"])


def _is_zero(group: dict[str, Any]) -> bool:
    lr = group["lr"]
    return (not isinstance(lr, Tensor) or on_host(lr)) and float(lr) == 0.0
