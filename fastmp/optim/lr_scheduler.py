"""A schedule written into the groups of any torch optimizer: torch's interface, and one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.optim.base import FusedOptimizer
from fastmp.schedule import Schedule, evaluate


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Writes ``schedule`` into the groups of any torch optimizer, with torch's own interface.

    After construction the groups hold the values of step ``last_epoch + 1``. Every ``step()``
    advances by one. The values depend on that count alone: groups added later get the same, times
    their ``lr_scale`` if they have one, and steps past the end keep the last value.

    With a fastmp optimizer the count is that of the steps *applied* since construction: a step
    skipped for a non-finite gradient does not count. ``step()`` then reads the device, which on a
    GPU waits for it; ``schedule.bind(optimizer)`` does not.

    Args:
        optimizer: any torch optimizer.
        schedule: (lr, momentum) of the number of steps; a momentum of None is left alone.
        last_epoch: number of steps taken before, minus one; -1 starts at the beginning.

    Raises:
        TypeError: not an optimizer.
        ValueError: a momentum for an optimizer that has none, or ``last_epoch`` below -1.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule, last_epoch: int = -1
    ) -> None:
        if last_epoch < -1:
            raise ValueError(f"last_epoch must be at least -1, got {last_epoch}")
        self.schedule = schedule
        self._first = self._start(optimizer, last_epoch + 1)
        for group in getattr(optimizer, "param_groups", ()):
            # torch requires it with last_epoch >= 0; it is not used here
            group.setdefault("initial_lr", _copy(group["lr"]))
        super().__init__(optimizer, last_epoch)

    @staticmethod
    def _start(optimizer: torch.optim.Optimizer, position: int) -> int | None:
        """The applied steps of a fastmp optimizer at step 0, if it is at ``position`` now."""
        if not isinstance(optimizer, FusedOptimizer):
            return None
        return int(optimizer.applied_steps) - position

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next step, with a fastmp optimizer to the number of applied ones.

        Args:
            epoch: the step to go to instead.

        Raises:
            ValueError: a momentum for an optimizer that has none, or a negative ``epoch``.
        """
        # Not super().step(): it warns of a missing optimizer.step() where a gradient scaler skipped
        # the first one, and after unpickling.
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        """As ``step``; torch's ``SequentialLR`` calls it."""
        if epoch is not None:
            self._first = self._start(self.optimizer, epoch)
            self.last_epoch = epoch
        elif isinstance(self.optimizer, FusedOptimizer) and self._first is not None:
            self.last_epoch = int(self.optimizer.applied_steps) - self._first
        else:
            self.last_epoch += 1
        self._write()

    def _write(self) -> None:
        apply(self.optimizer, *evaluate(self.schedule, self.last_epoch))
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """The lr of the current step, a float for each group (in torch it may be a tensor)."""
        lr, _ = evaluate(self.schedule, self.last_epoch)
        return [lr * float(group.get("lr_scale", 1.0)) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without the schedule: plain numbers that ``weights_only`` loading takes."""
        state: dict[str, Any] = super().state_dict()
        del state["schedule"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of ``state_dict``, and write its values into the groups.

        The optimizer's own state may be loaded before or after. The state may come from a run with
        another kind of optimizer.

        Raises:
            ValueError: a state without ``last_epoch``: not that of a scheduler.
        """
        if "last_epoch" not in state_dict:
            raise ValueError(
                "expected the state of a scheduler, with 'last_epoch', got the keys "
                f"{sorted(state_dict)}"
            )
        super().load_state_dict(state_dict)
        if self._first is None or not isinstance(self.optimizer, FusedOptimizer):
            self._first = self._start(self.optimizer, self.last_epoch)
        self._write()


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr


def apply(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None) -> None:
    """Write ``lr``, and ``momentum`` unless it is None, into every parameter group.

    A group with an ``lr_scale`` gets ``lr`` times that. Momentum goes where the optimizer keeps it:
    ``betas[0]`` for the Adam family, ``momentum`` for SGD. A tensor lr is filled in place, so that
    a captured graph sees the new value.

    Raises:
        ValueError: a momentum for an optimizer that has none. Nothing has changed then.
    """
    groups = optimizer.param_groups
    if momentum is not None and not all("betas" in g or "momentum" in g for g in groups):
        raise ValueError(
            f"the schedule sets a momentum, but {type(optimizer).__name__} has neither 'betas' "
            "nor 'momentum'; use a schedule without momentum"
        )
    filled: dict[int, float] = {}
    for group in groups:
        own = lr * float(group.get("lr_scale", 1.0))
        if isinstance(group["lr"], Tensor):
            # groups made with one tensor share it, until their scales differ
            if filled.setdefault(id(group["lr"]), own) != own:
                group["lr"] = group["lr"].clone()
            group["lr"].fill_(own)
        else:
            group["lr"] = own
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum
