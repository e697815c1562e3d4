"""How far a run has come, and when it cannot go on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmp.distributed.rendezvous import World
from fastmp.training.log import Step

MAX_SKIPS_IN_A_ROW = 20  # 65536 backs off to 0.06 in 20 halvings: it is not the scale
MIN_SCALE = 1.0  # below, the scale no longer saves small gradients, it loses them


class RunStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and where the state was saved."""


class NonFiniteLoss(RunStopped):
    """The loss, before any scaling, was infinite or not a number."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its number from 1, losses, accuracy in [0, 1], seconds of training, speed."""

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float
    samples_per_second: float

    def __str__(self) -> str:
        return (
            f"train loss {self.train_loss:.4f}  val loss {self.val_loss:.4f}  "
            f"accuracy {self.val_accuracy:.2%}  {self.seconds:.1f} s  "
            f"{self.samples_per_second:,.0f} samples/s"
        )


@dataclass
class Progress:
    """How far a run has come; with ``batch`` and the sums, in the middle of an epoch too."""

    epoch: int = 0  # finished
    step: int = 0  # attempted
    batch: int = 0  # of this epoch and rank, done
    samples: int = 0  # of this epoch, all ranks
    steps: int = 0  # of this epoch
    loss: float = 0.0  # summed over them
    seconds: float = 0.0  # of training in this epoch
    skips_in_a_row: int = 0


def stop_if_hopeless(step: Step, done: Progress, offender: str | int | None, world: World) -> None:
    """Raise if the step just logged says that more steps are of no use.

    Args:
        step: what it decided.
        done: with this step counted.
        offender: the first parameter whose gradient was not finite.
        world: to name the rank.

    Raises:
        NonFiniteLoss, RunStopped: which step, why, and what to do.
    """
    where = f"stopped at step {step.step}"
    if world.size > 1:
        where += f" on rank {world.rank} of {world.size}"
    if not math.isfinite(step.loss):
        raise NonFiniteLoss(
            f"{where}: the loss is {step.loss} (lr {step.lr:.3g}); "
            "lower the lr, or look for bad values in the data"
        )
    if done.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
        raise RunStopped(
            f"{where}: {done.skips_in_a_row} steps in a row had non-finite gradients, "
            f"the first in parameter {offender!r}; lower the lr"
        )
    if step.scale < MIN_SCALE:
        raise RunStopped(
            f"{where}: the loss scale fell to {step.scale:g}, below {MIN_SCALE:g}; "
            "lower the lr, or train in bf16 or fp32"
        )
