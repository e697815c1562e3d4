"""``ema``: averages of the weights that the update moves, against torch's and in fp64."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastmp
from fastmp.training.ema import EMA
from tests.optim.optim_cases import adam_w, give_gradients, parameters, same_bits, snapshot, steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def decay(step):
    return min(0.9, (1 + step) / (10 + step))


@pytest.mark.parametrize(
    "ema", [0.99, 0.3, decay, [0.5, 0.7, 0.2]], ids=["high", "low", "function", "list"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_they_are_those_of_torchs_averaged_model(dtype, ema):
    ours = parameters(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    model = nn.ParameterList(p.detach().to(wide, copy=True) for p in ours)
    optimizer = fastmp.optim.SGD(ours, lr=0.1, momentum=0.9, ema=ema)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(8):
        of_step = ema(step) if callable(ema) else ema
        of_step = of_step[min(step, 2)] if isinstance(ema, list) else of_step
        if step == 0:
            average = AveragedModel(model)
        average.multi_avg_fn = get_ema_multi_avg_fn(of_step)
        give_gradients(ours, list(model.parameters()), seed=step)
        optimizer.step()
        theirs.step()
        average.update_parameters(model)
    expected = [p.detach() for p in average.module.parameters()]
    torch.testing.assert_close(optimizer.averages(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skipped_step_leaves_them_to_the_bit(dtype):
    params = parameters(dtype)
    optimizer = adam_w(params, ema=0.9, max_grad_norm=1.0)
    steps(optimizer, params)
    before = snapshot(optimizer, params)
    params[3].grad[7] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same_bits(before, snapshot(optimizer, params))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_swapped_in_and_out(dtype):
    params = parameters(dtype)
    optimizer = adam_w(params, ema=0.5)
    steps(optimizer, params)
    before, versions = snapshot(optimizer, params), [p._version for p in params]
    masters = optimizer.masters()
    with optimizer.averaged():
        assert torch.equal(params[0], optimizer.state[params[0]]["average"].to(dtype))
        for use in (optimizer.step, optimizer.state_dict, optimizer.masters):
            with pytest.raises(RuntimeError, match=r"in this block of averaged\(\)"):
                use()
    assert same_bits(before, snapshot(optimizer, params))
    assert same_bits(masters, optimizer.masters())
    assert versions == [p._version for p in params]  # else remainders are dropped


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_has_the_same_bits(dtype):
    whole, half = parameters(dtype), parameters(dtype)
    a, b = adam_w(whole, ema=decay), adam_w(half, ema=decay)
    steps(a, whole, 6)
    steps(b, half, 3)
    resumed = [p.detach().clone().requires_grad_() for p in half]
    c = adam_w(resumed, ema=decay)
    c.load_state_dict(b.state_dict())
    steps(c, resumed, 3, first=3)
    assert same_bits(snapshot(a, whole), snapshot(c, resumed))


def test_averages_begin_at_the_weights_of_a_run_that_had_none():
    params = parameters()
    plain = adam_w(params)
    steps(plain, params, 3)
    optimizer = adam_w(params, ema=0.75)
    optimizer.load_state_dict(plain.state_dict())
    start = optimizer.masters()
    assert same_bits(start, optimizer.averages())
    steps(optimizer, params, 1, first=3)
    expected = [0.75 * old + 0.25 * p.detach() for old, p in zip(start, params, strict=True)]
    torch.testing.assert_close(optimizer.averages(), expected)
    plain.load_state_dict(optimizer.state_dict())
    assert not any("average" in own for own in plain.state.values())
    optimizer.ema = None
    assert not any("average" in own for own in optimizer.state.values())
    steps(optimizer, params, 1, first=4)


def test_a_step_recorded_now_would_keep_the_table():
    params = parameters()
    optimizer = adam_w(params, ema=0.9)
    steps(optimizer, params, 1)
    before = optimizer.launch_constants()
    steps(optimizer, params, 1, first=1)
    assert before == optimizer.launch_constants()
    optimizer.ema = [0.9, 0.8]
    assert before != optimizer.launch_constants()
    assert optimizer.ema == (0.9, 0.8)


BAD = [1.0, -0.1, float("nan"), [], [0.5, 1.5], lambda step: 0.1 * step, "0.9", lambda step: None]


@pytest.mark.parametrize("bad", BAD)
def test_other_decays_are_refused(bad):
    optimizer = adam_w(parameters(), ema=0.5)
    with pytest.raises(ValueError, match=r"ema: expected a decay in \[0, 1\)"):
        adam_w(parameters(), ema=bad)
    with pytest.raises(ValueError, match="ema: expected"):
        optimizer.ema = bad
    assert optimizer.ema == 0.5


def test_averages_of_an_optimizer_without_are_refused():
    optimizer = adam_w(parameters())
    for use in (optimizer.averages, optimizer.averaged().__enter__):
        with pytest.raises(ValueError, match="made with ema="):
            use()
    optimizer.ema = 0.5
    with pytest.raises(ValueError, match="values of the parameters' shapes"):
        optimizer.load_averages([torch.ones(3)])


def test_before_its_first_step_an_average_is_the_weight():
    """Which that step copies: values that it would replace are refused."""
    params = parameters(torch.bfloat16)
    optimizer = adam_w(params, lr=0.1, ema=0.9)
    frozen, *others = params
    give_gradients(params)
    others[0].grad.fill_(torch.inf)
    optimizer.step()
    with torch.no_grad():
        frozen.mul_(0.5)
    torch.testing.assert_close(optimizer.averages()[0], frozen.detach().float(), rtol=0, atol=0)
    frozen.grad = None
    steps(optimizer, others, 2)
    optimizer.state[others[1]]["step"] = 2  # as torch's older files have it
    averages = optimizer.averages()
    again = adam_w(params, lr=0.1, ema=0.9)
    with pytest.raises(ValueError, match="parameter 1 was in no step yet"):
        again.load_averages(averages)
    assert not again.state
    again.load_averages(again.averages())
    saved = optimizer.state_dict()
    del saved["state"][0]
    again.load_state_dict(saved)
    again.load_averages(averages)
    assert frozen not in again.state
    assert same_bits(again.averages(), averages)


def test_an_average_begins_at_a_weight_that_was_edited():
    """Not at what its old remainder makes of it."""
    params = parameters(torch.bfloat16)
    optimizer = adam_w(params)
    steps(optimizer, params, 2)
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)
    start = [p.detach().float() for p in params]
    optimizer.ema = 0.9
    steps(optimizer, params, 1, first=2)
    pairs = zip(start, optimizer.masters(), strict=True)
    torch.testing.assert_close(optimizer.averages(), [0.9 * old + 0.1 * new for old, new in pairs])


def test_an_average_begins_again_at_the_masters():
    params = parameters(torch.bfloat16)
    optimizer = adam_w(params, ema=0.9)
    average = EMA(nn.ParameterList(params), 0.9, optimizer)
    steps(optimizer, params, 3)
    average.restart()
    assert same_bits(optimizer.averages(), optimizer.masters())
    assert not torch.equal(optimizer.masters()[0], params[0].float())


def test_the_trainers_average_is_the_optimizers():
    """And what the optimizer has not, a batch norm's statistics, is averaged beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = adam_w(model.parameters(), lr=0.1)
    average = EMA(model, 0.9, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        average.update(optimizer.found_inf)
    found = average.state_dict()
    assert found.keys() == {n for n, v in model.state_dict().items() if v.is_floating_point()}
    assert torch.equal(found["0.weight"], optimizer.averages()[0])
    assert not torch.equal(found["1.running_mean"], model[1].running_mean)
    with average.swapped_in():
        assert torch.equal(model[0].weight, found["0.weight"])
        assert torch.equal(model[1].running_mean, found["1.running_mean"])
    other = adam_w(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    again = EMA(model, 0.9, other)
    again.load_state_dict(found)
    torch.testing.assert_close(other.averages(), optimizer.averages(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"0\.8 here and 0\.9 in the optimizer"):
        EMA(model, 0.8, other)
