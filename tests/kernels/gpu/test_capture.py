"""Captures that fail, and graphs that are dropped: everything in the process works afterwards."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_flatten

import fastmp
from fastmp.training.cuda_graph import CudaRecorder, Unsupported
from tests.kernels.gpu.graph_cases import check_process

if not torch.cuda.is_available():
    pytest.skip("a GPU is needed: steps are recorded there", allow_module_level=True)

GPU = torch.device("cuda")
ONES = torch.ones(1000, device=GPU)


def double(x):
    return 2 * x, torch.rand_like(x)


def waits(x):
    y = 2 * x
    return y + y.sum().item()


def raises(x):
    _ = 2 * x
    raise ValueError("the step's own error")


def is_interrupted(x):
    _ = torch.rand_like(x)
    raise KeyboardInterrupt


def capture(recorder, step=double):
    return recorder.capture(step, *tree_flatten(ONES))


def is_right(replay):
    """Twice the input, and other numbers at every replay."""
    doubled, drawn = replay([ONES + 1])
    before = drawn.clone()
    replay([ONES + 1])
    return bool((doubled == 4).all()) and not torch.equal(before, drawn)


@contextmanager
def fails_to_begin(recorder):
    """torch captures on no default stream: ``capture_begin`` raises before it takes a pool."""
    stream, recorder._stream = recorder._stream, torch.cuda.default_stream()
    yield
    recorder._stream = stream


def in_the_beginning(recorder):
    with fails_to_begin(recorder), pytest.raises(Unsupported, match="non-default stream"):
        capture(recorder)


def in_a_pool_without_graphs(recorder):
    """What torch asserts: ``capture_begin`` raises because of the pool."""
    other = CudaRecorder(GPU)
    lives = capture(other)([ONES])
    with pytest.raises(Unsupported, match="use_count"):
        capture(other)
    assert (lives[0] == 2).all()


def in_the_middle(recorder):
    with pytest.raises(Unsupported, match="captur"):
        capture(recorder, waits)


def in_python(recorder):
    with pytest.raises(Unsupported, match="the step's own error"):
        capture(recorder, raises)


def by_the_user(recorder):
    with pytest.raises(KeyboardInterrupt):
        capture(recorder, is_interrupted)


FAILURES = [in_the_beginning, in_a_pool_without_graphs, in_the_middle, in_python, by_the_user]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fail", FAILURES)
def test_a_capture_fails_between_others(fail, times):
    """The graphs before it stay right, alone and with those after it; all can be dropped."""
    recorder, other = CudaRecorder(GPU), CudaRecorder(GPU)
    graphs = [capture(recorder), capture(other)]
    for _ in range(times):
        fail(recorder)
        check_process()
    graphs += [capture(recorder), capture(recorder), capture(other)]
    assert all(is_right(graph) for graph in graphs)
    del graphs
    check_process()


def test_the_first_capture_fails_in_every_way():
    recorder = CudaRecorder(GPU)
    for fail in FAILURES:
        fail(recorder)
        check_process()
    assert is_right(capture(recorder))


def test_all_graphs_are_dropped_while_their_results_live():
    """``reset`` drops them; what they returned keeps its values, whatever is captured next."""
    step = fastmp.graphed(double)
    held = []
    for _ in range(4):
        step.reset()
        for size in (1000, 500):
            held += [step(ONES[:size]) for _ in range(6)]
        assert step.reason == ""
        check_process()
    assert all((doubled == 2).all() for doubled, _ in held)


def test_a_dropped_graph_and_its_successor_share_nothing():
    """Results that are not copies: the trainer's, which lie in the pool of the graphs."""
    recorder = CudaRecorder(GPU)
    replay = capture(recorder)
    for _ in range(3):
        (doubled, _), old = replay([ONES]), replay
        recorder.new_pool()
        replay = capture(recorder)
        del old
        replay([3 * ONES])
        assert (doubled == 2).all()
        check_process()


def test_a_process_with_failed_captures_ends_well():
    """The graphs are destroyed when the process ends; a pool released twice would abort it."""
    code = (
        "from tests.kernels.gpu import test_capture as t\n"
        "recorder = t.CudaRecorder(t.GPU)\n"
        "graph = t.capture(recorder)\n"
        "for fail in t.FAILURES: fail(recorder)\n"
        "assert t.is_right(graph)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
