"""How everything here is timed.

All candidates of a case run in one process, interleaved, in a new order every round, so that a
noisy neighbour, a changed clock or the caches left by the one before hit them alike; medians with
p20 and p80; the fastest baseline is the baseline. A case asserts that all candidates computed the
same thing on the very tensors it timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

OURS = "fastmp"
Run = Callable[[], object]
Measure = Callable[[Run], float]  # milliseconds of one call
Curve = list[tuple[float, float]]


@dataclass
class Timing:
    """Milliseconds of one candidate."""

    median: float
    p20: float
    p80: float


class Verdict(NamedTuple):
    """What was asked for, what was measured, and whether that is enough."""

    goal: str
    measured: str
    reached: bool


@dataclass
class Row:
    """One case: what was timed, for how long, and the ratio asked for."""

    subject: str
    case: str
    timings: dict[str, Timing]
    bytes_moved: int = 0  # by fastmp, from the formula at the head of its source; 0: not its bound
    goals: dict[str, float] = field(default_factory=dict)  # baseline or "best" -> ratio, at least
    share: float = 0.0  # of a plain copy's rate, at least; 0: not asked for
    notes: str = ""
    operations: int = 0  # of fastmp, where they are its bound
    peak: float = 0.0  # GFLOP/s that the machine can do of them; 0: not measured
    aside: Sequence[str] = ()  # candidates that do other work: shown, but no baseline
    series: str = ""  # rows of one series differ in size, and are a line in a picture
    curves: dict[str, Curve] = field(default_factory=dict)  # (seconds, accuracy) of each candidate
    ratios: dict[str, float] = field(default_factory=dict)
    baseline: str = ""
    gigabytes_per_second: float = 0.0
    gigaflops: float = 0.0

    def __post_init__(self) -> None:
        ours = self.timings[OURS].median
        self.ratios = {k: t.median / ours for k, t in self.timings.items() if k != OURS}
        same_work = [name for name in self.ratios if name not in self.aside]
        self.baseline = min(same_work, key=lambda name: self.ratios[name])
        self.gigabytes_per_second = self.bytes_moved / ours / 1e6
        self.gigaflops = self.operations / ours / 1e6

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest baseline."""
        return self.ratios[self.baseline]

    def rate(self, copy: float) -> str:
        """What was reached of what the machine can do; copy: GB/s of a plain copy."""
        if self.operations:
            share = f" ({self.gigaflops / self.peak:.0%})" if self.peak else ""
            return f"{self.gigaflops:.0f} GFLOP/s{share}"
        if not self.bytes_moved:
            return "-"
        return f"{self.gigabytes_per_second:.1f} GB/s ({self.gigabytes_per_second / copy:.0%})"

    def verdicts(self, copy: float) -> list[Verdict]:
        """On everything that is asked for; copy: GB/s of a plain copy."""
        found = []
        for name, goal in self.goals.items():
            baseline = self.baseline if name == "best" else name
            ratio = self.ratios[baseline]
            found.append(Verdict(f"{goal:g}x {baseline}", f"{ratio:.2f}x", ratio >= goal))
        if self.share:
            part = self.gigabytes_per_second / copy
            found.append(Verdict(f"{self.share:.0%} of a copy", f"{part:.0%}", part >= self.share))
        return found


class Case(NamedTuple):
    """Something to time; nothing is allocated before it is called."""

    name: str
    rows: Callable[[], list[Row]]


def wall_time(run: Run) -> float:
    """Milliseconds by the clock on the wall."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


class DeviceTime:
    """Milliseconds on the GPU, from a cache that holds nothing of the candidate's.

    Writing 512 MB takes the GPU 0.1 ms; meanwhile the host gets ahead with its launches.
    """

    def __init__(self) -> None:
        self._other_data = torch.empty(128 << 20, dtype=torch.float32, device="cuda")

    def __call__(self, run: Run) -> float:
        """Of one call, between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other_data.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def finished_time(run: Run) -> float:
    """Milliseconds until the GPU is done with it: what the host takes counts too."""
    torch.cuda.synchronize()

    def finished() -> None:
        run()
        torch.cuda.synchronize()

    return wall_time(finished)


@cache
def kernel_clock(device: str) -> Measure:
    """How kernels are timed there."""
    return DeviceTime() if device == "cuda" else wall_time


def step_clock(device: str) -> Measure:
    """How whole training steps are timed there."""
    return finished_time if device == "cuda" else wall_time


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int, label: str, measure: Measure
) -> dict[str, Timing]:
    """Median milliseconds of each candidate over interleaved rounds, two of warm-up before."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    order = random.Random(0)
    for number in _progress(range(rounds + 2), label):
        order.shuffle(names)
        for name in names:
            elapsed = measure(candidates[name])
            if number >= 2:
                samples[name].append(elapsed)
    return {name: timing(values) for name, values in samples.items()}


def _progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:  # gpu-check asks for nothing that does not come with torch
        return rounds
    shown: Iterable[int] = tqdm(rounds, desc=label, leave=False, disable=None)
    return shown


def timing(samples: Sequence[float]) -> Timing:
    """Median, p20 and p80 of samples."""
    cuts = statistics.quantiles(samples, n=5)
    return Timing(statistics.median(samples), cuts[0], cuts[-1])


def rounds_within(candidates: dict[str, Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into that time, 5 to 61; runs each candidate twice."""
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for candidate in candidates.values():
            candidate()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return max(5, min(61, round(seconds / (time.perf_counter() - start))))


def timed(
    candidates: dict[str, Callable[[], object]], seconds: float, label: str, measure: Measure
) -> dict[str, Timing]:
    """``interleave`` for about that time."""
    return interleave(candidates, rounds_within(candidates, seconds), label, measure)


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
