"""The counts, on gradients and weights chosen to underflow."""

from __future__ import annotations

import math

import pytest
import torch

import fastmp.optim
from fastmp.amp.underflow import Telemetry


def counted(param, grad, lr):
    optimizer = fastmp.optim.SGD([param], lr=lr)
    telemetry = Telemetry(optimizer)
    param.grad = grad
    telemetry.before()
    optimizer.step()
    return {name: int(count) for name, count in telemetry.after().items()}


def test_zero_and_subnormal_gradients():
    grad = torch.tensor([0.0, 1e-9, 6e-8, 6e-5, 7e-5, 1.0]).half()
    counts = counted(torch.nn.Parameter(torch.ones(6, dtype=torch.half)), grad, 0.1)
    assert counts["gradients"] == 6
    assert counts["gradients_zero"] == 2  # 1e-9 does not exist in fp16
    assert counts["gradients_subnormal"] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_save_what_the_weight_would_lose(dtype):
    grad = torch.tensor([0.0, 1.0, 1e-3, 1e-7]).to(dtype)
    counts = counted(torch.nn.Parameter(torch.ones(4, dtype=dtype)), grad, 0.1)
    # by 0.1 the weight moves; by 1e-4 only the master; by 1e-8 not even that
    assert (counts["updates_saved"], counts["updates_lost"]) == (1, 1)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.float32, 1), (torch.float64, 0)])
def test_full_precision_weights_are_their_own_masters(dtype, lost):
    grad = torch.tensor([0.0, 1.0, 1e-8], dtype=dtype)
    counts = counted(torch.nn.Parameter(torch.ones(3, dtype=dtype)), grad, 0.1)
    assert (counts["updates_saved"], counts["updates_lost"]) == (0, lost)


def test_a_skipped_step_loses_no_updates():
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    counts = counted(param, torch.tensor([1.0, math.inf]).half(), 0.1)
    assert (counts["updates_saved"], counts["updates_lost"]) == (0, 0)
    assert counts["gradients"] == 2


def test_without_gradients_there_is_nothing_to_count():
    telemetry = Telemetry(fastmp.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    telemetry.before()
    assert telemetry.after() == {}
