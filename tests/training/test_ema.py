"""The average of the weights: in fp32, over applied steps, swapped in for evaluation only."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import fastmp
from fastmp import amp
from fastmp.training.ema import EMA

APPLIED, SKIPPED = torch.zeros(()), torch.ones(())


def model_in(dtype):
    torch.manual_seed(0)
    return amp.convert(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_recurrence_in_fp32(dtype):
    model = model_in(dtype)
    average = EMA(model, 0.99)
    expected = model[0].weight.detach().double()
    for step in range(50):
        with torch.no_grad():
            model[0].weight.add_(0.01 * step)
        average.update(APPLIED)
        expected = 0.99 * expected + 0.01 * model[0].weight.detach().double()
    torch.testing.assert_close(
        average.state_dict()["0.weight"].double(), expected, rtol=1e-6, atol=1e-6
    )


def test_a_skipped_step_does_not_count():
    model = model_in(torch.float32)
    average = EMA(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = average.state_dict()["0.weight"].clone()
    average.update(SKIPPED)
    assert torch.equal(average.state_dict()["0.weight"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_has_its_own_weights_back_to_the_bit(dtype):
    model = model_in(dtype)
    average = EMA(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(APPLIED)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    version = model[0].weight._version
    with average.swapped_in():
        assert not torch.equal(model[0].weight, own["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert model[0].weight._version == version  # else remainders of bf16 weights are dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_swap_is_no_edit_of_the_weights(dtype):
    """Masters and the steps after it are those of a run without it."""

    def masters(swapped):
        model = model_in(dtype)
        optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-2)
        average = EMA(model, 0.9)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            average.update(optimizer.found_inf)
            with average.swapped_in() if swapped else nullcontext():
                pass
        return optimizer.masters()

    for with_swaps, without in zip(masters(True), masters(False), strict=True):
        assert torch.equal(with_swaps, without)


def test_state_goes_to_another_and_back():
    one, two = (EMA(model_in(torch.float32), 0.9) for _ in range(2))
    one.state_dict()["0.weight"].fill_(7.0)
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    assert float(two.state_dict()["0.weight"][0, 0]) == 7.0
    with pytest.raises(ValueError, match="another model: other is only on one side"):
        two.load_state_dict({**one.state_dict(), "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        EMA(model_in(torch.float32), 1)
