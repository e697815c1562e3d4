"""Which dtype trains a given model fastest on this device: measured.

The same CPU that runs bf16 three times as fast as fp32 may run fp16 a hundred times slower. So each
type trains on two samples first, and on a whole batch only if it keeps up there.

The choice is that of the times without noise, unless they are within a few percent of the margin:
of each type the fastest step counts, because other work of the machine only adds to a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

BUDGET = 4.0  # seconds for the interleaved rounds, once a machine and model
MAX_ROUNDS = 50
MAX_SLOWDOWN = 3.0  # times the step of the first type; slower types are dropped
MIN_TIMEOUT_S = 0.2  # shorter steps never drop a type: most of their time is start-up
MARGIN = 1.25  # of its speed to the first type's, for a type to be chosen
TRIES = 6  # steps of a type in which it keeps up, or is dropped: other work may slow some down
SMALL = 2  # samples

Step = Callable[[int], None]


@dataclass(frozen=True)
class Measurement:
    """The chosen type, and the ms of one step in each type; None for a type that was dropped."""

    chosen: str
    milliseconds: dict[str, float | None]

    def __str__(self) -> str:
        parts = [
            f"{name} {'dropped' if ms is None else f'{ms:.1f} ms'}"
            for name, ms in self.milliseconds.items()
        ]
        return f"a training step: {', '.join(parts)}; from {MARGIN}x the speed on it is taken"


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

    def warm(name: str, samples: int) -> float:
        """The time of the second step; the first also sets up libraries."""
        timed(name, samples)
        return timed(name, samples)

    def keeps_up(name: str, samples: int, limit: float) -> bool:
        """Whether one of a few steps is within the limit; two that are far beyond it decide."""
        try:
            best = timed(name, samples)
            for _ in range(TRIES - 1):
                best = min(best, timed(name, samples))
                if best <= limit or best > 4 * limit:
                    break
            return best <= limit
        except RuntimeError:  # an operation this type lacks here, or a loss that overflows in it
            return False

    candidates = [name for name in steps if name != baseline]
    for samples in (SMALL, batch_size):
        limit = max(MAX_SLOWDOWN * warm(baseline, samples), MIN_TIMEOUT_S)
        candidates = [name for name in candidates if keeps_up(name, samples, limit)]
    times: dict[str, float] = dict.fromkeys((baseline, *candidates), math.inf)
    deadline = clock() + BUDGET
    for _ in range(MAX_ROUNDS):
        for name, best in times.items():
            times[name] = min(best, timed(name, batch_size))
        if clock() > deadline:
            break
    weighted = {name: t * (1 if name == baseline else MARGIN) for name, t in times.items()}
    shown = {name: times[name] * 1e3 if name in times else None for name in steps}
    return Measurement(min(weighted, key=weighted.__getitem__), shown)
