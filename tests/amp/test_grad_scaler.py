"""The scaler against torch's, and the conversion of a model."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import fastmp

OPTIONS = {"init_scale": 2.0**14, "growth_interval": 3}


def model_and_optimizer(dtype, make=fastmp.optim.AdamW, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = fastmp.convert(model, dtype)
    return model, make(model.parameters(), lr=1e-2, **options)


def train(scaler, model, optimizer, steps=24, unscale=False, start=0):
    """Some steps with an overflow now and then; the scale and its growth counter after each."""
    seen = []
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator).to(dtype)
        if step % 5 == 3:
            x[2, 1] = torch.inf
        optimizer.zero_grad()
        scaler.scale(model(x).float().square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return seen


def test_the_default_device_is_the_one_that_is_there():
    """torch's default, "cuda", disables the scaler where there is no GPU: fp16 trains unscaled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = fastmp.amp.GradScaler()
    assert scaler.is_enabled()
    model, optimizer = model_and_optimizer(torch.float16)
    if torch.cuda.is_available():
        model.cuda()
    device = next(model.parameters()).device
    scaler.scale(model(torch.ones(2, 6).to(device, torch.float16)).float().mean()).backward()
    scaler.step(optimizer)
    assert scaler.get_scale() == 65536.0
    assert list(inspect.signature(type(scaler)).parameters) == list(
        inspect.signature(torch.amp.GradScaler).parameters
    )


@pytest.mark.parametrize("unscale", [False, True])
def test_the_scale_follows_torchs_to_the_bit(unscale):
    theirs = model_and_optimizer(torch.float32, torch.optim.AdamW)
    expected = train(torch.amp.GradScaler("cpu", **OPTIONS), *theirs, unscale=unscale)
    for kind in (fastmp.amp.GradScaler, torch.amp.GradScaler):
        ours = model_and_optimizer(torch.float32)
        assert train(kind("cpu", **OPTIONS), *ours, unscale=unscale) == expected
        assert ours[1].skipped_steps == 5
        for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_scaler_and_ours_give_the_same_bits(dtype):
    runs = []
    for kind in (fastmp.amp.GradScaler, torch.amp.GradScaler):
        model, optimizer = model_and_optimizer(dtype, max_grad_norm=0.1)
        runs.append((train(kind("cpu", **OPTIONS), model, optimizer), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])


def test_any_other_optimizer_is_served_by_torchs_code():
    runs = [
        train(kind("cpu", **OPTIONS), *model_and_optimizer(torch.float32, torch.optim.SGD))
        for kind in (fastmp.amp.GradScaler, torch.amp.GradScaler)
    ]
    assert runs[0] == runs[1]


def test_two_optimizers_share_one_scale():
    scaler = fastmp.amp.GradScaler("cpu", **OPTIONS)
    good, bad = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    a, b = fastmp.optim.SGD([good]), fastmp.optim.SGD([bad])
    scaler.scale(good.sum() + bad.sum()).backward()
    bad.grad[1] = torch.nan
    scaler.step(a)
    scaler.step(b)
    scaler.update()
    assert scaler.get_scale() == 2.0**13
    assert (a.found_inf, b.found_inf) == (0, 1)
    assert torch.equal(bad, torch.ones(3))
    assert not torch.equal(good, torch.ones(3))


def test_unscale_before_the_step():
    scaler = fastmp.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer = model_and_optimizer(torch.float16)
    scaler.scale(model(torch.ones(2, 6).half()).float().mean()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="below 6e-8 vanish"):
        scaler.unscale_(optimizer)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad / 1024)
    norm = torch.cat([p.grad.float().flatten() for p in model.parameters()]).norm()
    scaler.step(optimizer)  # must not unscale a second time
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-5, atol=0)


def test_torchs_errors():
    scaler = fastmp.amp.GradScaler("cpu")
    _, optimizer = model_and_optimizer(torch.float32)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    scaler.scale(torch.ones(()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        scaler.load_state_dict({})


def test_no_gradients_is_the_same_error_as_torchs():
    scaler = fastmp.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(model_and_optimizer(torch.float32)[1])
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


def test_disabled():
    scaler = fastmp.amp.GradScaler("cpu", enabled=False)
    model, optimizer = model_and_optimizer(torch.float32)
    before = copy.deepcopy(model.state_dict())
    train(scaler, model, optimizer, steps=1)
    assert scaler.state_dict() == {}
    assert scaler.get_scale() == 1.0
    scaler.load_state_dict({})
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("source", [fastmp.amp.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("target", [fastmp.amp.GradScaler, torch.amp.GradScaler])
def test_state_travels_in_either_direction(source, target):
    first = source("cpu", **OPTIONS)
    model, optimizer = model_and_optimizer(torch.float32)
    train(first, model, optimizer, steps=7)
    second = target("cpu")
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    twin = copy.deepcopy((model, optimizer.state_dict()))
    restored = fastmp.optim.AdamW(twin[0].parameters(), lr=1e-2)
    restored.load_state_dict(twin[1])
    rest = train(first, model, optimizer, steps=9, start=7)
    assert train(second, twin[0], restored, steps=9, start=7) == rest


def test_no_warning_without_fp16_gradients():
    scaler = fastmp.amp.GradScaler("cpu")
    model, optimizer = model_and_optimizer(torch.bfloat16)
    scaler.scale(model(torch.ones(2, 6).bfloat16()).float().mean()).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scaler.unscale_(optimizer)
    assert caught == []
