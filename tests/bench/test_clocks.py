"""The clock of a GPU: the device's time without the host's, on a simulated queue and on a GPU."""

import time

import pytest
import torch

from fastmp.bench import clocks
from fastmp.bench.clocks import DeviceClock, Prepared, Sample
from fastmp.bench.harness import timed, timing


class Simulation:
    """A device that works through its queue, and the host's clock; milliseconds."""

    EVICTION = 0.1

    def __init__(self):
        self.host = 0.0  # now
        self.free = 0.0  # when the device will have done all of its queue
        self.cached = False

    def now(self):
        return self.host / 1e3

    def enqueue(self, milliseconds):
        self.free = max(self.free, self.host) + milliseconds

    def candidate(self, host, device):
        """Spends so much of the host's time before it launches a kernel."""
        self.host += host
        self.enqueue(device / (2 if self.cached else 1))
        self.cached = True

    def synchronize(self):
        self.host = max(self.host, self.free)

    def evict_caches(self):
        self.enqueue(self.EVICTION)
        self.cached = False

    def sleep(self, milliseconds):
        self.enqueue(milliseconds)

    def record(self):
        return max(self.free, self.host)

    def elapsed(self, start, end):
        self.host = max(self.host, end)
        return end - start


@pytest.fixture
def device():
    return Simulation()


@pytest.mark.parametrize(("host", "kernel"), [(5.0, 0.1), (0.05, 3.0), (0.3, 0.3)])
def test_device_time_is_without_the_hosts(device, host, kernel):
    clock = DeviceClock(device, device.now)
    sample = clock(lambda: device.candidate(host, kernel))
    assert sample == pytest.approx(Sample(kernel, host))


def test_without_the_pause_it_would_be_the_hosts(device, monkeypatch):
    monkeypatch.setattr(device, "sleep", lambda milliseconds: None)
    sample = DeviceClock(device, device.now)(lambda: device.candidate(5.0, 0.1))
    assert sample.time > 4


def test_a_candidate_that_waits_for_the_device_is_charged_for_it(device):
    def run():
        device.candidate(1.0, 0.2)
        device.synchronize()
        device.candidate(1.0, 0.2)

    sample = DeviceClock(device, device.now)(run)
    assert sample.host == pytest.approx(1.0 + 0.2 + 1.0)
    assert sample.time == pytest.approx(0.2 + 1.0 + 0.1)  # the second finds a warm cache


def test_a_call_of_a_compiler_does_not_pause_the_device_for_minutes(device):
    DeviceClock(device, device.now)(lambda: device.candidate(60_000.0, 0.1))
    assert device.host < 60_000 * 2 + 2000


def test_preparation_is_in_neither_time(device):
    calls = []

    def prepare():
        calls.append("prepare")
        device.host += 7.0

    def run():
        calls.append("run")
        device.candidate(2.0, 0.5)

    sample = DeviceClock(device, device.now)(Prepared(prepare, run))
    assert sample == pytest.approx(Sample(0.5, 2.0))
    assert calls == ["prepare", "run"] * 2


def test_both_times_of_candidates_reach_the_timings(device):
    runs = {
        "fastmp": lambda: device.candidate(5.0, 0.1),
        "eager": lambda: device.candidate(1.0, 0.4),
    }
    timings = timed(runs, 1e-3, "test", DeviceClock(device, device.now))
    assert (timings["fastmp"].median, timings["fastmp"].host) == pytest.approx((0.1, 5.0))
    assert (timings["eager"].median, timings["eager"].host) == pytest.approx((0.4, 1.0))


def test_a_cpu_has_one_time():
    sample = clocks.wall_time(lambda: time.sleep(0.002))
    assert sample.time >= 2
    assert sample.host is None
    assert timing([sample] * 3).host is None


# ---- on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU to be timed")


@needs_gpu
def test_on_a_gpu_device_time_is_without_the_hosts():
    """A candidate of 5 ms of Python and 0.1 ms of kernels."""
    clock = clocks.kernel_clock("cuda")
    queue = clock._queue

    def run():
        end = time.perf_counter() + 5e-3
        while time.perf_counter() < end:
            pass
        queue.sleep(0.1)

    sample = clock(run)
    assert sample.time == pytest.approx(0.1, abs=0.02)
    assert 5.0 <= sample.host < 6.0


@needs_gpu
def test_on_a_gpu_a_step_is_timed_until_the_device_is_idle():
    queue = clocks.kernel_clock("cuda")._queue
    sample = clocks.finished_time(lambda: queue.sleep(3.0))
    assert sample.time == pytest.approx(3.0, rel=0.1)
    assert sample.host < 1.0
