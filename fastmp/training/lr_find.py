"""The learning-rate range test (Smith 2015, arXiv:1506.01186): one short run, every rate once."""

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

DIVERGED = 4.0  # times the best smoothed loss: the test is over
FEWEST = 3  # losses, below which there is no curve


@dataclass(frozen=True)
class Finding:
    """What the test measured, and the two rules for reading it.

    Attributes:
        lrs: the rates that were tried, rising.
        losses: the loss of the step taken at each, on the weights before that step.
        smoothed: their running average: exponential, bias corrected.
        settled: how many steps the average needs before it holds enough losses to be read.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    settled: int = 0

    @property
    def suggestion(self) -> float:
        """The lr at which the smoothed loss falls fastest over log lr, before its minimum.

        Below it training is only slower. Between it and the minimum every further growth of the lr
        buys less than the one before: the steepest directions of the loss have begun to overshoot,
        and behind the minimum they win. So it is the largest lr that the loss still rewards in
        full, a good peak for a schedule. NaN if the loss never fell before it diverged: ``low`` was
        too high, or the steps too few.
        """
        lowest = int(np.argmin(self.smoothed))
        slopes = np.gradient(self.smoothed, np.log(self.lrs))[: lowest + 1]
        slopes[: min(self.settled, lowest)] = 0.0
        steepest = int(np.argmin(slopes))
        return self.lrs[steepest] if slopes[steepest] < 0 else math.nan

    @property
    def at_minimum(self) -> float:
        """The lr of the lowest smoothed loss, the edge of divergence.

        A tenth of it is the second rule: where the two differ a lot the curve is too noisy, and
        more steps are needed.
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
    """Train for ``steps`` steps with an lr that grows from ``low`` to ``high``, and undo it all.

    The lr grows by the same factor from step to step; momentum stays as it is. The test ends early
    when the smoothed loss exceeds four times its best, or the loss is not finite. Afterwards the
    model, the optimizer, the loss scale and the random numbers are bitwise what they were, however
    the test ended.

    Args:
        trainer: as it would train, batch size and accumulation included: the best lr depends on
            them. One with a ``folder`` logs the steps of the test there.
        batches: (images, labels); walked again from the start as often as it takes.
        low: first lr.
        high: last lr.
        steps: optimizer steps from one to the other. Few on steep curves put the suggestion close
            to the edge; very many learn a small problem early, at needlessly low rates.
        smoothing: weight of the past in the running average of the loss, in [0, 1). It lags by
            about ``1 / (1 - smoothing)`` steps.

    Raises:
        ValueError: an argument out of its range, no batches, or a loss that cannot be used from
            the first steps on.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < low < high, both finite, got low={low}, high={high}")
    if steps < FEWEST:
        raise ValueError(f"steps must be at least {FEWEST}, got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}")
    schedule = trainer.schedule
    # the state of a trainer may share its memory with the weights that are about to change
    state = copy.deepcopy(trainer.state_dict())
    lrs = np.geomspace(low, high, steps).tolist()
    try:
        losses, smoothed = _measure(trainer, _endless(batches), lrs, smoothing)
    finally:
        trainer.schedule = schedule
        trainer.load_state_dict(state)
    if len(losses) < FEWEST:
        raise ValueError(
            f"the loss diverged at step {len(losses) + 1}, with lr {lrs[len(losses)]:.3g}: look "
            "for bad values in the data or the weights, or start from a lower lr than "
            f"low={low:g}"
        )
    settled = min(round(1 / (1 - smoothing)), len(losses) // 2)
    return Finding(tuple(lrs[: len(losses)]), tuple(losses), tuple(smoothed), settled)


def _measure(
    trainer: Trainer, batches: Iterator[Batch], lrs: list[float], smoothing: float
) -> tuple[list[float], list[float]]:
    """The losses and their running average, up to the end or to where they diverge."""
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with tqdm(lrs, desc="lr test", leave=False, disable=None) as bar:
        for lr in bar:
            # not one schedule for all: it would wait where a step is skipped
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
    """The loss of one step; NaN if the trainer finds that it cannot go on."""
    group = [next(batches) for _ in range(trainer.accumulate)]
    try:
        trainer.train_step(group)
        return trainer.last_loss()
    except RunStopped:
        return math.nan


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches over and over."""
    walks = 0
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            got = "none" if walks == 0 else "an iterator that is used up: pass what makes it"
            raise ValueError(f"batches: expected (images, labels) pairs, got {got}")
        walks += 1
