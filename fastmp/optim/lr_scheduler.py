"""A schedule written into the groups of any torch optimizer: torch's interface, and one step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastmp.optim.base import FusedOptimizer
from fastmp.optim.options import plain
from fastmp.optim.saved import LoadedState
from fastmp.schedule import Schedule, evaluate


class LRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Writes ``schedule`` into the groups of any torch optimizer, with torch's own interface.

    After construction the groups hold the values of position ``last_epoch + 1``. The values depend
    on the position alone: groups added later get the same, times their ``lr_scale`` if they have
    one, and positions past the end keep the last value.

    The schedule's ``unit`` is that of its argument. In "epochs" every ``step()`` advances by one,
    as torch's schedulers do: call it once an epoch. In "steps" a fastmp optimizer says how many
    steps it has *applied* since construction: one that was skipped for a non-finite gradient does
    not count. ``step()`` then reads the device, which on a GPU waits for it;
    ``schedule.bind(optimizer)`` does not. Other optimizers count no steps, and every call is one.

    Args:
        optimizer: any torch optimizer.
        schedule: (lr, momentum) of the number of steps or epochs; a momentum of None is left alone.
        last_epoch: number of steps or epochs taken before, minus one; -1 starts at the beginning.
        unit: "steps" or "epochs"; None: "steps", and ``step()`` refuses to pass several at once.

    Raises:
        TypeError: not an optimizer.
        ValueError: a momentum for an optimizer that has none, ``last_epoch`` below -1, or another
            unit.
    """

    _loaded_at: tuple[int, int] | None = None  # applied steps in a loaded state, and at position 0

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        last_epoch: int = -1,
        *,
        unit: Literal["steps", "epochs"] | None = None,
    ) -> None:
        if last_epoch < -1:
            raise ValueError(f"last_epoch must be at least -1, got {last_epoch}")
        if unit not in (None, "steps", "epochs"):
            raise ValueError(f"unit must be 'steps' or 'epochs', got {unit!r}")
        self.schedule = schedule
        self.unit = unit
        self.optimizer = optimizer
        self._first = self._start(last_epoch + 1)
        for group in getattr(optimizer, "param_groups", ()):
            # torch requires it with last_epoch >= 0; it is not used here
            group.setdefault("initial_lr", _copy(group["lr"]))
        super().__init__(optimizer, last_epoch)
        if isinstance(optimizer, FusedOptimizer):
            optimizer._warn_of_group_rates()

    def _applied(self) -> int | None:
        """The applied steps of the optimizer; None where calls are counted instead."""
        if self.unit == "epochs" or not isinstance(self.optimizer, FusedOptimizer):
            return None
        return int(self.optimizer.applied_steps)

    def _start(self, position: int) -> int | None:
        """The applied steps at position 0, if it is at ``position`` now, whatever was loaded."""
        self._loads = getattr(self.optimizer, "_loaded", LoadedState()).number
        applied = self._applied()
        return None if applied is None else applied - position

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next epoch, or to the number of steps that the optimizer has applied.

        Args:
            epoch: the position to go to instead.

        Raises:
            RuntimeError: several steps were applied since the last call, and no ``unit`` says
                whether the schedule counts them. Nothing has changed then.
            ValueError: a momentum for an optimizer that has none, or a negative ``epoch``.
        """
        # Not super().step(): it warns of a missing optimizer.step() where a gradient scaler skipped
        # the first one, and after unpickling.
        self._update_lr(epoch)
        self._step_count += 1

    def _update_lr(self, epoch: int | None = None) -> None:
        """As ``step``; torch's ``SequentialLR`` calls it."""
        if epoch is not None:
            epoch = plain(epoch)
            self._first = self._start(epoch)
            self.last_epoch = epoch
        else:
            self.last_epoch = self._next_position()
        self._loaded_at = None
        self._write()

    def _next_position(self) -> int:
        applied = self._applied()
        if applied is None:
            return self.last_epoch + 1
        was_loaded = self._follow_loaded_optimizer() or self._loaded_at is not None
        assert self._first is not None
        position = applied - self._first
        if self.unit is None and position > self.last_epoch + 1 and not was_loaded:
            raise RuntimeError(
                f"LRScheduler.step() expected at most one applied step since the last call, got "
                f"{position - self.last_epoch}: pass unit='epochs' if the schedule counts calls of "
                "step(), such as one an epoch, or unit='steps' if it counts applied steps"
            )
        return position

    def _follow_loaded_optimizer(self) -> bool:
        """After ``load_state_dict`` of the optimizer its count is another one, the position not."""
        assert isinstance(self.optimizer, FusedOptimizer)
        loaded = self.optimizer._loaded
        if loaded.number == self._loads:
            return False
        self._loads = loaded.number
        self._anchor(loaded.applied)
        return True

    def _write(self) -> None:
        apply(self.optimizer, *evaluate(self.schedule, self.last_epoch))
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """The lr of the current step, a float for each group (in torch it may be a tensor)."""
        lr, _ = evaluate(self.schedule, self.last_epoch)
        return [lr * float(group.get("lr_scale", 1.0)) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without schedule and unit: plain numbers, for ``weights_only`` loading."""
        state: dict[str, Any] = super().state_dict()
        for name in ("schedule", "unit", "_loads", "_loaded_at"):
            state.pop(name, None)
        rates = zip(self.optimizer.param_groups, self._last_lr, strict=False)
        in_groups = all(bool(group["lr"] == lr) for group, lr in rates)
        return {**state, "applied": self._applied(), "in_groups": in_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position of ``state_dict``, and write its values into the groups.

        They are not written if they were not in the groups when the state was saved: another part
        of a ``SequentialLR`` had the turn then, say.

        The optimizer's own state may be loaded before or after, or not at all. The state may come
        from a run with another kind of optimizer.

        Raises:
            ValueError: a state without ``last_epoch``: not that of a scheduler.
        """
        if "last_epoch" not in state_dict:
            raise ValueError(
                "expected the state of a scheduler, with 'last_epoch', got the keys "
                f"{sorted(state_dict)}"
            )
        own = {k: v for k, v in state_dict.items() if k not in ("applied", "in_groups")}
        super().load_state_dict(own)
        first, self._loaded_at = self._first, None
        if first is not None:  # "applied" is missing in states of older versions
            self._loaded_at = state_dict.get("applied", first + self.last_epoch), first
        self._anchor(self._applied())
        if state_dict.get("in_groups", True) and self.last_epoch >= 0:
            self._write()

    def _anchor(self, applied: int | None) -> None:
        """Keep the position with an optimizer that has applied this many steps.

        If that is the optimizer of the saved run, steps since the last ``step()`` count too.
        """
        if self._loaded_at is not None and applied == self._loaded_at[0]:
            self._first = self._loaded_at[1]
        else:
            self._first = None if applied is None else applied - self.last_epoch


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
