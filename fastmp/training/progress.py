"""The progress of a run, and the reasons to stop it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmp.distributed.rendezvous import World

if TYPE_CHECKING:
    from fastmp.training.evaluation import Evaluation  # its settings have these results

MAX_SKIPS_IN_A_ROW = 20  # 20 halvings take 65536 to 0.06: the loss scale is not the reason
MIN_SCALE = 1.0  # a smaller one flushes small gradients to zero instead of saving them


class RunStopped(RuntimeError):
    """Training cannot go on; the message gives step, reason, and where the state is saved."""


class NonFiniteLoss(RunStopped):
    """The loss, before any scaling, was infinite or not a number."""


@dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step, on the host.

    ``scale`` is the loss scale of its gradients, ``grad_norm`` the norm of the unscaled gradients
    before clipping.
    """

    step: int
    lr: float
    loss: float
    scale: float
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its number from 1, losses, accuracy in [0, 1], seconds of training, speed.

    Loss and accuracy of the validation are None without one.
    """

    epoch: int
    train_loss: float
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    samples_per_second: float

    def __str__(self) -> str:
        """At most 66 columns: with its name an epoch is a line of a terminal of 80."""
        parts = [f"loss {self.train_loss:.3f}"]
        if self.val_loss is not None and self.val_accuracy is not None:
            parts += [f"val {self.val_loss:.3f}", f"accuracy {self.val_accuracy:.2%}"]
        seconds = f"{self.seconds:.1f}" if self.seconds < 100 else f"{self.seconds:,.0f}"
        return "  ".join([*parts, f"{seconds} s", f"{self.samples_per_second:,.0f} samples/s"])


@dataclass
class Progress:
    """Finished epochs, attempted steps, and the position and sums within the current epoch."""

    epoch: int = 0
    step: int = 0
    batch: int = 0  # finished in this epoch on this rank
    samples: int = 0  # of this epoch, all ranks
    steps: int = 0  # logged in this epoch
    loss: float = 0.0  # summed over them
    seconds: float = 0.0  # of training in this epoch
    skips_in_a_row: int = 0

    def result(self, evaluation: Evaluation | None) -> EpochResult:
        """The results of the finished epoch; None: there was no validation."""
        return EpochResult(
            epoch=self.epoch + 1,
            train_loss=self.loss / self.steps,
            val_loss=None if evaluation is None else evaluation.loss,
            val_accuracy=None if evaluation is None else evaluation.accuracy,
            seconds=self.seconds,
            samples_per_second=self.samples / self.seconds,
        )

    def steps_per_epoch(self) -> int | None:
        """Of the finished epochs; None where none is finished, or another one is under way."""
        return self.step // self.epoch if self.epoch and not self.batch else None

    def next_epoch(self) -> Progress:
        """The progress at the start of the next epoch."""
        return Progress(self.epoch + 1, self.step, skips_in_a_row=self.skips_in_a_row)


def raise_if_diverged(
    step: StepResult, progress: Progress, first_nonfinite: str | int | None, world: World
) -> None:
    """Stop a run that more steps cannot save.

    Args:
        step: the last one.
        progress: this step included.
        first_nonfinite: the parameter with the first non-finite gradient.
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
    if progress.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
        raise RunStopped(
            f"{where}: {progress.skips_in_a_row} steps in a row had non-finite gradients, "
            f"the first in parameter {first_nonfinite!r}; lower the lr"
        )
    if step.scale < MIN_SCALE:
        raise RunStopped(
            f"{where}: the loss scale fell to {step.scale:g}, below {MIN_SCALE:g}; "
            "lower the lr, or train in bf16 or fp32"
        )
