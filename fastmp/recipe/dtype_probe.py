"""Which dtype trains a given model fastest on this device: measured, not guessed.

The same CPU that runs bf16 three times as fast as fp32 may run fp16 a hundred times slower, so a
type first has to show a step of two samples before it may try a whole batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

BUDGET = 2.0  # seconds for the interleaved rounds
MAX_ROUNDS = 9
HOPELESS = 3.0  # times the first type's step: not worth another measurement
PATIENCE = 0.2  # seconds: so short a step is always measured, its start-up counts too much
NEAR_ENOUGH = 1.1  # a 16-bit type may be 10% slower than fp32: it halves the memory
SMALL = 2  # samples

Step = Callable[[int], None]


@dataclass(frozen=True)
class Verdict:
    """The chosen type, and what was measured: ms a step, None for a type that was given up."""

    chosen: str
    milliseconds: dict[str, float | None]

    def __str__(self) -> str:
        parts = [
            f"{name} {'given up' if ms is None else f'{ms:.1f} ms'}"
            for name, ms in self.milliseconds.items()
        ]
        return f"{self.chosen} (a training step: {', '.join(parts)})"


def fastest(
    steps: Mapping[str, Step], batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> Verdict:
    """Time one training step of each type, interleaved, and choose.

    Args:
        steps: by name of the type, fp32 first: takes a number of samples, trains on that many, and
            returns when the device is done.
        batch_size: samples of the steps that count.
        clock: seconds.
    """
    baseline = next(iter(steps))

    def timed(name: str, samples: int) -> float:
        started = clock()
        steps[name](samples)
        return clock() - started

    def warm(name: str, samples: int, limit: float = math.inf) -> float:
        """Of the second step: the first also sets up libraries. One is enough far beyond."""
        first = timed(name, samples)
        return first if first > 4 * limit else timed(name, samples)

    def keeps_up(name: str, samples: int, limit: float) -> bool:
        try:
            return warm(name, samples, limit) <= limit
        except RuntimeError:  # an operation this type lacks here, or a loss that overflows in it
            return False

    racing = [name for name in steps if name != baseline]
    for samples in (SMALL, batch_size):
        limit = max(HOPELESS * warm(baseline, samples), PATIENCE)
        racing = [name for name in racing if keeps_up(name, samples, limit)]
    times: dict[str, list[float]] = {name: [] for name in (baseline, *racing)}
    deadline = clock() + BUDGET
    for _ in range(MAX_ROUNDS):
        for name, measured in times.items():
            measured.append(timed(name, batch_size))
        if clock() > deadline:
            break
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    chosen = min(medians, key=lambda name: medians[name] * (NEAR_ENOUGH if name == baseline else 1))
    shown = {name: medians[name] * 1e3 if name in medians else None for name in steps}
    return Verdict(chosen, shown)
