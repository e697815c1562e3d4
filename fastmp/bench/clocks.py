"""The clocks of the benchmarks.

A call on a GPU has two times. Device time: between two events in the queue, the host so far ahead
that the device never waits for it. Host time: until the call returns. On an H200 the events around
a loss of 173 µs were 955 µs apart while the device waited for Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

CLOCKS = {"cpu": "wall", "cuda": "device"}  # of kernels; that of whole steps is "wall"
Run = Callable[[], object]


class Sample(NamedTuple):
    """Milliseconds of one call; ``host``: until it returns, None on a CPU, where it is the same."""

    time: float
    host: float | None = None


Measure = Callable[[Run], Sample]


@dataclass(frozen=True)
class Prepared:
    """A call with a preparation: ``DeviceClock`` runs that before each call, untimed."""

    prepare: Run
    run: Run

    def __call__(self) -> object:
        """The call alone."""
        return self.run()


class CudaQueue:
    """The current stream of the current GPU, and the pauses and events of ``DeviceClock`` in it."""

    def __init__(self) -> None:
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other_data = torch.zeros(cache_bytes, dtype=torch.float32, device="cuda")  # 4x L2
        cycles = 2_000_000
        torch.cuda._sleep(cycles)  # its kernel is loaded here, before it is timed
        start = self.record()
        torch.cuda._sleep(cycles)
        self._cycles_per_ms = cycles / self.elapsed(start, self.record())

    def synchronize(self) -> None:
        """Wait until the GPU is idle."""
        torch.cuda.synchronize()

    def evict_caches(self) -> None:
        """Read 4 times the L2; the write-back of a written buffer would be timed (12 µs)."""
        self._other_data.sum()

    def sleep(self, milliseconds: float) -> None:
        """Let the GPU spin."""
        torch.cuda._sleep(int(milliseconds * self._cycles_per_ms))

    def record(self) -> torch.cuda.Event:
        """An event in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds between two events."""
        end.synchronize()
        return float(start.elapsed_time(end))


class DeviceClock:
    """Device and host time of a call, in two runs of it, from caches without its data.

    Before the second the device sleeps for twice the host time of the first, and so starts on the
    call when all of it is in the queue. A candidate that waits for the device is charged for it.

    Args:
        queue: of the device.
        now: seconds of the host's clock.
    """

    MAX_SLEEP_MS = 1000.0  # a host time above 500 ms is a compilation, in a round of warm-up

    def __init__(self, queue: CudaQueue, now: Callable[[], float] = time.perf_counter) -> None:
        self._queue = queue
        self._now = now

    def __call__(self, run: Run) -> Sample:
        """Milliseconds of both."""
        _prepare(run)
        self._queue.synchronize()
        begin = self._now()
        run()
        host = (self._now() - begin) * 1e3
        _prepare(run)
        self._queue.evict_caches()
        self._queue.sleep(min(2 * host, self.MAX_SLEEP_MS))
        start = self._queue.record()
        run()
        return Sample(self._queue.elapsed(start, self._queue.record()), host)


def _prepare(run: Run) -> None:
    if isinstance(run, Prepared):
        run.prepare()


def wall_time(run: Run) -> Sample:
    """By the host's clock: all of the time on a CPU."""
    begin = time.perf_counter()
    run()
    return Sample((time.perf_counter() - begin) * 1e3)


def finished_time(run: Run) -> Sample:
    """By the host's clock until the GPU is idle: a training step, whose host time counts too."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return Sample((time.perf_counter() - begin) * 1e3, (returned - begin) * 1e3)


@cache
def kernel_clock(device: str) -> Measure:
    """How kernels are timed there."""
    return DeviceClock(CudaQueue()) if device == "cuda" else wall_time


def step_clock(device: str) -> Measure:
    """How whole training steps are timed there."""
    return finished_time if device == "cuda" else wall_time
