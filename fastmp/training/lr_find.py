"""The learning-rate range test (Smith 2015, arXiv:1506.01186): a short run with a rising lr."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fastmp.schedule import Constant
from fastmp.training.step import Batch
from fastmp.training.trainer import RunStopped, Trainer

DIVERGED = 4.0  # the test ends at this multiple of the lowest smoothed loss
MIN_STEPS = 3  # fewer losses make no curve


class RangeTestError(ValueError):
    """Arguments out of range, no batches, or a loss that diverges within the first steps."""


@dataclass(frozen=True)
class Finding:
    """The measured curve, and the two rules for reading it.

    Attributes:
        lrs: the learning rates of the steps, rising.
        losses: the loss of each step, on the weights before that step.
        smoothed: their running average: exponential, bias corrected.
        settled: steps at the start that are not read: the average has too few losses there.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    settled: int = 0

    @property
    def suggestion(self) -> float:
        """The lr at which the smoothed loss falls fastest over log lr, before its minimum.

        A lower lr is only slower. Above it, towards the minimum, each further increase of the lr
        gains less than the one before: the steepest directions of the loss overshoot, and beyond
        the minimum they dominate. So it is a good peak for a schedule. NaN if the loss never fell
        before it diverged: ``low`` was too high, or the steps too few.
        """
        lowest = int(np.argmin(self.smoothed))
        slopes = np.gradient(self.smoothed, np.log(self.lrs))[: lowest + 1]
        slopes[: min(self.settled, lowest)] = 0.0
        steepest = int(np.argmin(slopes))
        return self.lrs[steepest] if slopes[steepest] < 0 else math.nan

    @property
    def at_minimum(self) -> float:
        """The lr of the lowest smoothed loss, the edge of divergence.

        The second rule is a tenth of it. If the two rules differ a lot, the curve is too noisy and
        needs more steps.
        """
        return self.lrs[int(np.argmin(self.smoothed))]


def find(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
) -> Finding:
    """Train for ``steps`` steps with an lr that grows from ``low`` to ``high``, and restore all.

    The lr grows by the same factor from step to step; the momentum stays. The test ends early when
    the smoothed loss exceeds four times its minimum, or the loss is not finite. Afterwards, also
    after an error, the model, the optimizer, the loss scale and the random numbers are bitwise as
    before.

    Args:
        trainer: with the batch size and accumulation of the training: the best lr depends on them.
            A trainer with a ``folder`` logs the steps of the test there.
        batches: (images, labels); repeated until the test ends.
        low: first lr.
        high: last lr.
        steps: optimizer steps from ``low`` to ``high``. Few steps on a steep curve put the
            suggestion close to the edge; very many fit a small data set at needlessly low rates.
        smoothing: weight of the past in the running average of the loss, in [0, 1). The average
            lags by about ``1 / (1 - smoothing)`` steps.

    Raises:
        RangeTestError: an argument out of its range, no batches, or a loss that diverges within
            the first steps.
    """
    check(low, high, steps)
    if not 0 <= smoothing < 1:
        raise RangeTestError(f"smoothing must lie in [0, 1), got {smoothing}")
    schedule = trainer.schedule
    # deepcopy: the tensors of the state may be the weights themselves
    state = copy.deepcopy(trainer.state_dict())
    lrs = np.geomspace(low, high, steps).tolist()
    try:
        losses, smoothed = _measure(trainer, _endless(batches), lrs, smoothing)
    finally:
        trainer.schedule = schedule
        trainer.load_state_dict(state)
    if len(losses) < MIN_STEPS:
        raise RangeTestError(
            f"the loss diverged at step {len(losses) + 1}, with lr {lrs[len(losses)]:.3g}: look "
            "for bad values in the data or the weights, or start from a lower lr than "
            f"low={low:g}"
        )
    settled = min(round(1 / (1 - smoothing)), len(losses) // 2)
    return Finding(tuple(lrs[: len(losses)]), tuple(losses), tuple(smoothed), settled)


def check(low: float, high: float, steps: int) -> None:
    """Raise ``RangeTestError`` for rates or a number of steps that ``find`` does not take."""
    if not 0 < low < high < math.inf:
        raise RangeTestError(f"expected 0 < low < high, both finite, got low={low}, high={high}")
    if steps < MIN_STEPS:
        raise RangeTestError(f"steps must be at least {MIN_STEPS}, got {steps}")


def _measure(
    trainer: Trainer, batches: Iterator[Batch], lrs: list[float], smoothing: float
) -> tuple[list[float], list[float]]:
    """The losses and their running average, to the last lr or to divergence."""
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with tqdm(lrs, desc="lr test", leave=False, disable=None) as bar:
        for lr in bar:
            # a constant for each step: one schedule for all would stay at a skipped step's lr
            trainer.schedule = Constant(lr)
            loss = _loss_of_step(trainer, batches)
            if not math.isfinite(loss):
                break
            average = smoothing * average + (1 - smoothing) * loss
            losses.append(loss)
            smoothed.append(average / (1 - smoothing ** len(losses)))
            bar.set_postfix_str(f"lr {lr:.2e}  loss {smoothed[-1]:.3f}", refresh=False)
            if smoothed[-1] > DIVERGED * min(smoothed):
                break
    return losses, smoothed


def _loss_of_step(trainer: Trainer, batches: Iterator[Batch]) -> float:
    """The loss of one step; NaN if the trainer stops."""
    group = [next(batches) for _ in range(trainer.accumulate)]
    try:
        trainer.train_step(group)
        return trainer.last_loss()
    except RunStopped:
        return math.nan


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, repeated without end."""
    passes = 0
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            got = "none" if passes == 0 else "an exhausted iterator: pass the iterable itself"
            raise RangeTestError(f"batches: expected (images, labels) pairs, got {got}")
        passes += 1
