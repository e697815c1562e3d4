"""Which dtype trains a given model fastest on this device: measured, not guessed.

The same CPU that runs bf16 three times as fast as fp32 may run fp16 a hundred times slower. So each
type trains on two samples first, and on a whole batch only if it keeps up there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

BUDGET = 2.0  # seconds for the interleaved rounds
MAX_ROUNDS = 9
MAX_SLOWDOWN = 3.0  # times the step of the first type; slower types are dropped
MIN_TIMEOUT_S = 0.2  # shorter steps never drop a type: most of their time is start-up
FP32_HANDICAP = 1.1  # a 16-bit type may be 10% slower than fp32: it halves the memory
SMALL = 2  # samples

Step = Callable[[int], None]


@dataclass(frozen=True)
class Measurement:
    """The fastest type, and the ms of one step in each type; None for a type that was dropped."""

    chosen: str
    milliseconds: dict[str, float | None]

    def __str__(self) -> str:
        parts = [
            f"{name} {'dropped' if ms is None else f'{ms:.1f} ms'}"
            for name, ms in self.milliseconds.items()
        ]
        return f"{self.chosen} (a training step: {', '.join(parts)})"


def fastest(
    steps: Mapping[str, Step], batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> Measurement:
    """Time one training step of each type, interleaved, and choose.

    Args:
        steps: by name of the type, fp32 first: takes a number of samples, trains on that many, and
            returns when the device is done.
        batch_size: samples of a whole batch.
        clock: seconds.
    """
    baseline = next(iter(steps))

    def timed(name: str, samples: int) -> float:
        started = clock()
        steps[name](samples)
        return clock() - started

    def warm(name: str, samples: int, limit: float = math.inf) -> float:
        """The time of the second step; the first also sets up libraries. Far beyond the limit the
        first one decides.
        """
        first = timed(name, samples)
        return first if first > 4 * limit else timed(name, samples)

    def keeps_up(name: str, samples: int, limit: float) -> bool:
        try:
            return warm(name, samples, limit) <= limit
        except RuntimeError:  # an operation this type lacks here, or a loss that overflows in it
            return False

    candidates = [name for name in steps if name != baseline]
    for samples in (SMALL, batch_size):
        limit = max(MAX_SLOWDOWN * warm(baseline, samples), MIN_TIMEOUT_S)
        candidates = [name for name in candidates if keeps_up(name, samples, limit)]
    times: dict[str, list[float]] = {name: [] for name in (baseline, *candidates)}
    deadline = clock() + BUDGET
    for _ in range(MAX_ROUNDS):
        for name, measured in times.items():
            measured.append(timed(name, batch_size))
        if clock() > deadline:
            break
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    weighted = {n: ms * (FP32_HANDICAP if n == baseline else 1) for n, ms in medians.items()}
    shown = {name: medians[name] * 1e3 if name in medians else None for name in steps}
    return Measurement(min(weighted, key=weighted.__getitem__), shown)
