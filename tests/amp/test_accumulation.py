"""Accumulation: 16-bit gradients are summed in fp32 and rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmp.amp.accumulation import Accumulator

HALVES = [torch.float16, torch.bfloat16]


def passes(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(257, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", HALVES)
@given(count=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_sum_is_rounded_once(dtype, count, seed):
    param = torch.nn.Parameter(torch.zeros(257, dtype=dtype))
    accumulator = Accumulator([param])
    grads = passes(count, dtype, seed)
    for i, grad in enumerate(grads):
        param.grad = grad.clone()
        if i < count - 1:
            accumulator.stash()
            assert param.grad is None
    accumulator.finish()
    expected = grads[0].float()
    for grad in grads[1:]:
        expected = expected + grad.float()
    assert torch.equal(param.grad, expected.to(dtype))


def test_sixty_four_passes_beat_autograd():
    param = torch.nn.Parameter(torch.zeros(257, dtype=torch.bfloat16))
    accumulator = Accumulator([param])
    grads = passes(64, torch.bfloat16)
    naive = torch.zeros(257, dtype=torch.bfloat16)
    for i, grad in enumerate(grads):
        naive += grad
        param.grad = grad.clone()
        if i < 63:
            accumulator.stash()
    accumulator.finish()
    exact = torch.stack(grads).double().sum(0)
    ours = (param.grad.double() - exact).abs().max()
    assert ours < (naive.double() - exact).abs().max() / 4


def test_fp32_gradients_are_left_to_autograd():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    accumulator = Accumulator([param])
    accumulator.stash()
    assert torch.equal(param.grad, torch.ones(3))


def test_a_parameter_that_the_last_pass_missed_keeps_its_sum():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    accumulator = Accumulator([param])
    for value in (1.0, 2.0):
        param.grad = torch.full((2,), value, dtype=torch.float16)
        accumulator.stash()
    accumulator.finish()
    assert torch.equal(param.grad, torch.full((2,), 3.0, dtype=torch.float16))
    param.grad = None
    accumulator.finish()  # nothing is left over for the next step
    assert param.grad is None


def test_an_overflow_stays_one():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    accumulator = Accumulator([param])
    for values in ([torch.inf, 60000.0], [-torch.inf, 60000.0], [0.0, 0.0]):
        param.grad = torch.tensor(values, dtype=torch.float16)
        if values[0]:
            accumulator.stash()
    accumulator.finish()
    assert not param.grad.isfinite().any()  # inf - inf, and 120000 is beyond fp16
