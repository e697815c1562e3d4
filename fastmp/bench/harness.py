"""How everything here is timed.

All candidates of a case run in one process, interleaved, in a new order every round, so that a
noisy neighbour, a changed clock or the caches left by the candidate before hit them alike; medians
with p20 and p80; the fastest comparable candidate is the baseline. A case asserts that all
candidates computed the same values on the very tensors it timed. ``clocks`` has the clocks.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastmp.bench.clocks import Measure, Run, Sample, kernel_clock

OURS = "fastmp"
Curve = list[tuple[float, float]]


@dataclass
class Timing:
    """Milliseconds of one candidate; ``host``: median of the host's, None on a CPU."""

    median: float
    p20: float
    p80: float
    host: float | None = None


class GoalResult(NamedTuple):
    """A goal, the measured value, and whether that reaches it."""

    goal: str
    measured: str
    reached: bool


@dataclass
class Row:
    """The timings of one case, its goals, and the ratios that follow."""

    subject: str
    case: str
    timings: dict[str, Timing]
    bytes_moved: int = 0  # by fastmp, from the formula at the head of its source; 0: not its bound
    goals: dict[str, float] = field(default_factory=dict)  # baseline or "best" -> ratio, at least
    host_goals: dict[str, float] = field(default_factory=dict)  # the same of host time
    host_limit: float = 0.0  # milliseconds of the host, at most; 0: no goal
    limit: float = 0.0  # milliseconds, at most; 0: no goal
    copy_fraction: float = 0.0  # of a plain copy's rate, at least; 0: no goal
    notes: str = ""
    operations: int = 0  # of fastmp, where they are its bound
    peak: float = 0.0  # GFLOP/s that the machine can do of them; 0: not measured
    not_comparable: Sequence[str] = ()  # candidates that do different work: shown, not ranked
    series: str = ""  # rows of one series differ in size, and are a line in a picture
    clock: str = "wall"  # "device": the medians are device time
    curves: dict[str, Curve] = field(default_factory=dict)  # (seconds, accuracy) of each candidate
    ratios: dict[str, float] = field(default_factory=dict)
    baseline: str = ""
    gigabytes_per_second: float = 0.0
    gigaflops: float = 0.0

    def __post_init__(self) -> None:
        ours = self.timings[OURS].median
        self.ratios = {k: t.median / ours for k, t in self.timings.items() if k != OURS}
        self.baseline = self._best(self.ratios)
        self.gigabytes_per_second = self.bytes_moved / ours / 1e6
        self.gigaflops = self.operations / ours / 1e6

    def _best(self, ratios: dict[str, float]) -> str:
        comparable = [name for name in ratios if name not in self.not_comparable]
        return min(comparable, key=lambda name: ratios[name])

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest baseline."""
        return self.ratios[self.baseline]

    @property
    def host_ratios(self) -> dict[str, float]:
        """As ``ratios``, of host time; empty on a CPU."""
        ours = self.timings[OURS].host
        if ours is None:
            return {}
        return {k: t.host / ours for k, t in self.timings.items() if k != OURS and t.host}

    def rate(self, copy: float) -> str:
        """The rate reached, and its fraction of the bound; copy: GB/s of a plain copy."""
        if self.operations:
            fraction = f" ({self.gigaflops / self.peak:.0%})" if self.peak else ""
            return f"{self.gigaflops:.0f} GFLOP/s{fraction}"
        if not self.bytes_moved:
            return "-"
        return f"{self.gigabytes_per_second:.1f} GB/s ({self.gigabytes_per_second / copy:.0%})"

    def goal_results(self, copy: float) -> list[GoalResult]:
        """One for each goal, with the time it is about; copy: GB/s of a plain copy."""
        results = []
        host = self.host_ratios
        sides = [(self.goals, self.ratios, f", {self.clock} time" if host else "")]
        sides += [(self.host_goals, host, ", host time")]
        for goals, ratios, clock in sides:
            for name, goal in goals.items():
                baseline = self._best(ratios) if name == "best" else name
                ratio = ratios[baseline]
                text = f"{goal:g}x {baseline}{clock}"
                results.append(GoalResult(text, f"{ratio:.2f}x", ratio >= goal))
        spent = self.timings[OURS].host
        if self.host_limit and spent is not None:
            text = f"at most {self.host_limit:g} ms of host time"
            results.append(GoalResult(text, f"{spent:.3g} ms", spent <= self.host_limit))
        if self.limit:
            median = self.timings[OURS].median
            text = f"at most {self.limit:g} ms"
            results.append(GoalResult(text, f"{median:.3g} ms", median <= self.limit))
        if self.copy_fraction:
            reached = self.gigabytes_per_second / copy
            text = f"{self.copy_fraction:.0%} of a copy"
            results.append(GoalResult(text, f"{reached:.0%}", reached >= self.copy_fraction))
        return results


class Case(NamedTuple):
    """A case to time; nothing is allocated before ``rows`` is called."""

    name: str
    rows: Callable[[], list[Row]]


#: Called once, when everything that a case times is compiled and before it is timed.
ON_COMPILED: list[Run] = []


def announce_compiled() -> None:
    """Call the functions in ``ON_COMPILED``, and forget them."""
    while ON_COMPILED:
        ON_COMPILED.pop()()


def interleave(
    candidates: dict[str, Run], rounds: int, label: str, measure: Measure
) -> dict[str, Timing]:
    """Median milliseconds of each candidate over interleaved rounds, two of warm-up before."""
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    names = list(candidates)
    order = random.Random(0)
    for number in _progress(range(rounds + 2), label):
        order.shuffle(names)
        for name in names:
            sample = measure(candidates[name])
            if number >= 2:
                samples[name].append(sample)
    return {name: timing(values) for name, values in samples.items()}


def _progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:  # gpu-check needs nothing that does not come with torch
        return rounds
    shown: Iterable[int] = tqdm(rounds, desc=label, leave=False, disable=None)
    return shown


def timing(samples: Sequence[Sample]) -> Timing:
    """Median, p20 and p80 of the times, median of the host's."""
    times = [sample.time for sample in samples]
    cuts = statistics.quantiles(times, n=5)
    hosts = [sample.host for sample in samples if sample.host is not None]
    host = statistics.median(hosts) if hosts else None
    return Timing(statistics.median(times), cuts[0], cuts[-1], host)


def timed(
    candidates: dict[str, Run], seconds: float, label: str, measure: Measure
) -> dict[str, Timing]:
    """``interleave`` for about that time, 5 to 61 rounds; runs each candidate twice before."""
    for run in candidates.values():
        run()
    announce_compiled()
    begin = time.perf_counter()
    for run in candidates.values():
        measure(run)
    rounds = max(5, min(61, round(seconds / (time.perf_counter() - begin))))
    return interleave(candidates, rounds, label, measure)


def copy_bandwidth(device: str) -> float:
    """GB/s of a plain copy, read + write, in this process."""
    source = torch.randn(500_000_000 if device == "cuda" else 50_000_000, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    median = interleave(runs, 9, "copy", kernel_clock(device))["copy"].median
    return source.numel() * 8 / median / 1e6


def dtype_name(dtype: torch.dtype) -> str:
    """As in float16."""
    return str(dtype).removeprefix("torch.")
