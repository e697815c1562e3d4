"""``master="split"``: fp16 weights with a 16-bit remainder instead of an fp32 master."""

import copy

import pytest
import torch

import fastmp
from fastmp.backends import registry
from fastmp.ops.update import join_master, split_master
from tests.optim.optim_cases import adam_w, parameters, same_bits, snapshot, steps

FP16 = torch.float16
WEIGHTS = torch.arange(-(2**15), 2**15).to(torch.int16).view(FP16)


@pytest.mark.parametrize("rest", [0, 1, -1, 4095, -4096, 8191, -8192, -16384, 32767, -32768, None])
def test_every_master_rounds_to_its_weight(rest):
    remainder = torch.full((2**16,), rest or 0, dtype=torch.int16)
    if rest is None:
        remainder.random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(0))
    again, _ = split_master(join_master(WEIGHTS, remainder), FP16)
    torch.testing.assert_close(again, WEIGHTS, rtol=0, atol=0, equal_nan=True)
    least = torch.where(WEIGHTS.abs() < 2**-17, 2.0**-25, WEIGHTS.float().abs() * 2**-8)
    away = (join_master(WEIGHTS, remainder) - WEIGHTS.float()).abs()
    assert (away <= least)[WEIGHTS.isfinite()].all()


def test_a_master_comes_back_exactly_or_within_its_bound():
    bits = torch.randint(-(2**31), 2**31, (2_000_000,), generator=torch.Generator().manual_seed(1))
    edges = WEIGHTS[WEIGHTS.isfinite()].double()
    near = [edges, *(((edges[1:] + edges[:-1]) / 2).float() * f for f in (1, 1 + 2**-22))]
    masters = torch.cat([bits.to(torch.int32).view(torch.float32), *(n.float() for n in near)])
    masters = masters[masters.abs() < 65504]
    weight, remainder = split_master(masters, FP16)
    found = join_master(weight, remainder)
    exact = weight.abs() > 2**-17
    assert torch.equal(found[exact], masters[exact])
    assert (found - masters).abs()[~exact].max() <= 2**-41 * 1.001
    nearest = (weight.double() - masters.double()).abs()  # half of the distance between two fp16
    assert (nearest <= (masters.double().abs() * 2**-11).clamp(min=2**-25)).all()


def test_beyond_the_largest_weight():
    for value, expected in ((65504.0, 65504.0), (65519.0, 65519.0), (65520.0, torch.inf)):
        weight, remainder = split_master(torch.tensor([value, -value]), FP16)
        assert join_master(weight, remainder).tolist() == [expected, -expected]
    weight, remainder = split_master(torch.tensor([torch.nan, -0.0]), FP16)
    assert (weight.isnan()[0], int(remainder.abs().max())) == (True, 0)


@pytest.mark.parametrize("kernel", [True, False])
def test_kernel_and_reference_split_and_join_alike(monkeypatch, kernel):
    """A step that changes nothing, from every weight with any remainder."""
    p = WEIGHTS[WEIGHTS.isfinite()].clone().requires_grad_()
    remainder = torch.empty(p.shape, dtype=torch.int16)
    remainder.random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(2))
    master = join_master(p.detach(), remainder)
    expected = split_master(master, FP16)
    optimizer = fastmp.optim.SGD([p], lr=0.0, master="split")
    if not kernel:
        monkeypatch.delitem(registry._kernels, ("update", "cpu"), raising=False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["remainder_fp16"].copy_(remainder)
    optimizer.step()
    assert same_bits([p.detach(), optimizer.state[p]["remainder_fp16"]], expected)


def test_100_steps_are_those_of_fp32_masters():
    whole, split = parameters(FP16), parameters(FP16)
    a, b = adam_w(whole), adam_w(split, master="split")
    steps(a, whole, 100)
    steps(b, split, 100)
    for ours, theirs in zip(b.masters(), a.masters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    kept = b.state[split[0]]
    assert kept.keys() == {"exp_avg", "exp_avg_sq", "remainder_fp16", "step"}
    assert kept["remainder_fp16"].dtype == torch.int16


@pytest.mark.parametrize("kinds", [(None, "split"), ("split", None), ("split", "split")], ids=str)
def test_state_of_either_kind_is_loaded(kinds):
    """In either order of model and optimizer, and on."""
    one, two = kinds
    whole, half = parameters(FP16), parameters(FP16)
    a, b = adam_w(whole, master=two), adam_w(half, master=one)
    steps(a, whole, 6)
    steps(b, half, 3)
    saved = copy.deepcopy(b.state_dict())
    resumed = parameters(FP16, seed=9)
    c = adam_w(resumed, master=two)
    c.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(resumed, half, strict=True):
            p.copy_(q)
    torch.testing.assert_close(c.masters(), b.masters(), rtol=0, atol=2**-41)
    steps(c, resumed, 3, first=3)
    if one == two:
        assert same_bits(snapshot(a, whole), snapshot(c, resumed))
    torch.testing.assert_close(c.masters(), a.masters(), rtol=1e-6, atol=1e-9)


def test_state_goes_to_fp32_and_bf16_weights():
    params = parameters(FP16)
    optimizer = adam_w(params, master="split")
    steps(optimizer, params)
    for dtype in (torch.float32, torch.bfloat16):
        other = [p.detach().to(dtype).requires_grad_() for p in params]
        loaded = adam_w(other)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        exact = dtype == torch.float32
        rtol = 0 if exact else 2**-8
        torch.testing.assert_close(loaded.masters(), optimizer.masters(), rtol=rtol, atol=2**-16)
        if exact:
            assert same_bits(loaded.masters(), optimizer.masters())


def test_a_changed_weight_is_the_truth_and_a_skipped_step_changes_nothing():
    params = parameters(FP16)
    optimizer = adam_w(params, master="split")
    steps(optimizer, params)
    with torch.no_grad():
        params[4].mul_(0.5)
    assert torch.equal(optimizer.masters()[4], params[4].detach().float())
    params[3].grad[7] = torch.nan
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same_bits(before, [p.detach() for p in params])
    with optimizer_like(optimizer, params).averaged():
        pass


def optimizer_like(optimizer, params):
    """With averages, 8-bit moments and its state."""
    other = adam_w(params, master="split", state_dtype="8bit", ema=0.9)
    other.load_state_dict(optimizer.state_dict())
    steps(other, params, 1)
    return other


def test_another_master_is_refused():
    with pytest.raises(ValueError, match="master: expected None or 'split', got 'half'"):
        adam_w(parameters(), master="half")
