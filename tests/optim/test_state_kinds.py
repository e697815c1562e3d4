"""``state_dtype``: moments in bf16 and 8 bits, rounded stochastically; conversions and resumes."""

import copy

import pytest
import torch

import fastmp
from fastmp import checkpoint
from fastmp.backends import registry
from fastmp.ops.update import state_kinds
from fastmp.ops.update.state_kinds import Quantity
from tests.optim.optim_cases import adam_w, give_gradients, parameters, same_bits, snapshot, steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 65), (5000,), (3, 5), (16385,), (2, 33, 8, 9)]
KINDS = [torch.bfloat16, "8bit"]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
makes = pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("Lion", {})],
    ids=lambda v: str(v),
)


def made(dtype=torch.float32, kind="8bit", name="AdamW", **options):
    """Parameters, one of them channels_last, and an optimizer of them."""
    params = parameters(dtype, SHAPES)
    params[4].data = params[4].data.to(memory_format=torch.channels_last)
    optimizer = getattr(fastmp.optim, name)(params, lr=0.01, state_dtype=kind, **options)
    return params, optimizer


# ---- kernels, reference, random bits ----


@kinds
@makes
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounds_with_the_same_bits(monkeypatch, dtype, name, options, kind):
    """But where the rule itself differs in the last place, just across a boundary."""
    ours, a = made(dtype, kind, name, **options)
    theirs, b = made(dtype, kind, name, **options)
    steps(a, ours)
    monkeypatch.delitem(registry._kernels, ("update", "cpu"), raising=False)
    steps(b, theirs)
    pairs = [
        (a.state[p][key], b.state[q][key])
        for p, q in zip(ours, theirs, strict=True)
        for key in a.state[p].keys() - {"step", "master", "remainder"}
    ]
    narrow = [(x, y) for x, y in pairs if x.dtype in (torch.bfloat16, torch.uint8)]
    assert len(narrow) >= 4
    differing = sum(int((x != y).sum()) for x, y in narrow)
    assert differing <= 1e-3 * sum(x.numel() for x, _ in narrow)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def of_every_magnitude():
    """Blocks of 32 from 2^-149 to the largest number, with zeros, inf and NaN among them. Their
    number leaves a part of the last 128 elements."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-149, 128).repeat_interleave(32)
    spread = torch.randint(0, 12, exponents.shape, generator=generator)
    values = torch.randn(exponents.shape, generator=generator).clamp(-1.99, 1.99)
    values = torch.ldexp(values.double(), exponents - spread).float()
    values[::67] = 0.0
    values[1::71] = -0.0
    values[32 * 3 : 32 * 5] *= 0.0
    values[32 * 50 + 1] = torch.inf
    values.view(torch.int32)[32 * 101 + 1] = 0x7FFFFFFF  # a NaN that a carry would make -0
    values[32 * 270 : 32 * 270 + 8] = torch.finfo(torch.float32).max
    return values


@kinds
@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {"betas": (0.0, 0.5)}), ("SGD", {"momentum": 1.0, "dampening": 1.0})],
)
def test_every_magnitude_has_the_bits_of_the_reference(monkeypatch, name, options, kind):
    """Two steps whose moments are exact in fp32: g and g²/2, then 0 and half of the second, or the
    momentum again. So the first is stored, the second read and stored."""
    runs = []
    for _ in range(2):
        p = torch.zeros(277 * 32, requires_grad=True)
        optimizer = getattr(fastmp.optim, name)(
            [p], lr=0.0, state_dtype=kind, skip_nonfinite=False, **options
        )
        for grad in (of_every_magnitude(), torch.zeros(277 * 32)):
            p.grad = grad
            optimizer.step()
            state = optimizer.state[p]
            runs.append({key: state[key].clone() for key in state.keys() - {"step", "master"}})
        monkeypatch.delitem(registry._kernels, ("update", "cpu"), raising=False)
    for found, expected in zip(runs[:2], runs[2:], strict=True):
        for key, value in found.items():
            pair = [value, expected[key]]
            if (
                value.dtype == torch.bfloat16
            ):  # NaN has many patterns; of inf the rules make inf or NaN
                pair = [v.nan_to_num(7.0, 7.0, 7.0).view(torch.int16) for v in pair]
            assert torch.equal(*pair), key


@kinds
def test_bits_do_not_depend_on_the_number_of_threads(kind):
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params, optimizer = made(kind=kind)
        steps(optimizer, params)
        runs.append(snapshot(optimizer, params))
    torch.set_num_threads(before)
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])


def words(seed=0, step=1.0, index=0):
    return state_kinds.random_words(seed, torch.tensor(step), index, 1 << 16)


def bits(words):
    return (words[:, None] >> torch.arange(32)) & 1


def test_random_bits_are_uniform_and_independent():
    """Every bit 1 half of the time, alone and beside every bit of another element, step, parameter
    or seed: within 5.5 standard deviations of 65,536 coins."""
    one = bits(words())
    others = [one.roll(shift, 0) for shift in (1, 2, 3, 4, 32)]
    others += [bits(words(step=2.0)), bits(words(index=1))]
    others += [bits(words(seed=1)), one.roll(1, 1), one.roll(16, 1)]
    assert (one.float().mean(0) - 0.5).abs().max() < 5.5 * 0.5 / 256
    for other in others:
        together = (2.0 * one - 1).T @ (2.0 * other - 1) / len(one)
        aligned = together.diagonal().abs().max()
        assert aligned < 5.5 / 256
        if other is not others[-1] and other is not others[-2]:
            assert together.abs().max() < 5.5 / 256
    assert len(words().unique()) >= len(one) - 5  # 0.5 pairs are expected in random words


@pytest.mark.parametrize("quantity", [Quantity.SIGNED, Quantity.SQUARE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_rounding_is_right_on_average(quantity, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(64, generator=generator) + 0.05
    values = values if quantity is Quantity.SQUARE else values - 0.6
    state = torch.empty_like(values, dtype=dtype)
    scales = torch.zeros(2, dtype=torch.uint8)
    total = torch.zeros(64, dtype=torch.float64)
    count = 500
    for step in range(count):
        drawn = state_kinds.random_words(0, torch.tensor(float(step)), 3, 64)
        random = state_kinds.bits_for_state(drawn, 0, dtype)
        state_kinds.store(values, state, quantity, scales, random)
        total += state_kinds.load(state, quantity, scales)
    spacing = 2**-7 if dtype == torch.bfloat16 else 2**-4  # at most, relative to the largest
    assert (total / count - values).abs().max() < 4.5 * 0.5 * spacing / count**0.5


@kinds
def test_a_second_moment_falls_to_the_truth(kind):
    """6,000 steps from 1 towards 0.25; rounded to nearest, bf16 stays at 1."""
    p = torch.zeros(4096, requires_grad=True)
    optimizer = fastmp.optim.Adam([p], lr=0.0, state_dtype=kind, skip_nonfinite=False)
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    saved = optimizer.fp32_state_dict()
    saved["state"][0]["exp_avg_sq"].fill_(1.0)
    optimizer.load_state_dict(saved)
    for _ in range(6000):
        optimizer.step()
    moment = optimizer.fp32_state_dict()["state"][0]["exp_avg_sq"]
    truth = 0.25 + 0.75 * 0.999**6000
    assert abs(float(moment.mean()) / truth - 1) < 0.02


# ---- saving, loading, converting ----


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_has_the_same_bits(dtype, kind, tmp_path):
    """Through a file, which stores tensors contiguously: blocks follow the order of memory."""
    whole, a = made(dtype, kind)
    half, b = made(dtype, kind)
    a.rounding_seed = b.rounding_seed = 7
    steps(a, whole, 6)
    steps(b, half, 3)
    checkpoint.save(tmp_path / "state", b.state_dict())
    resumed, c = made(dtype, kind)
    for p, q in zip(resumed, half, strict=True):
        p.data.copy_(q)
    c.load_state_dict(checkpoint.load(tmp_path / "state"))
    steps(c, resumed, 3, first=3)
    assert same_bits(snapshot(a, whole), snapshot(c, resumed))
    d = copy.deepcopy(c)
    assert d.state_dtype == kind


@kinds
def test_a_skipped_step_leaves_every_byte(kind):
    params, optimizer = made(torch.bfloat16, kind)
    steps(optimizer, params)
    before = snapshot(optimizer, params)
    params[1].grad[7] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same_bits(before, snapshot(optimizer, params))


def values(optimizer):
    """What the state stands for: a block may have two scales that hold its values exactly."""
    states = optimizer.fp32_state_dict()["state"].values()
    return [value.clone() for own in states for _, value in sorted(own.items())]


@makes
@kinds
def test_fp32_is_a_way_there_and_back(kind, name, options):
    params, optimizer = made(torch.bfloat16, kind, name, **options)
    steps(optimizer, params)
    other = copy.deepcopy(optimizer)
    optimizer.state_dtype = torch.float32
    assert all(v.dtype != torch.uint8 for p in params for v in optimizer.state[p].values())
    optimizer.state_dtype = kind
    assert same_bits(values(optimizer), values(other))
    optimizer.load_state_dict(optimizer.fp32_state_dict())
    assert same_bits(values(optimizer), values(other))
    optimizer.state_dtype = "8bit" if kind == torch.bfloat16 else torch.bfloat16
    steps(optimizer, params, 1)
    assert optimizer.applied_steps == 5


@kinds
def test_state_goes_to_torch_and_comes_back(kind):
    ours, optimizer = made(kind=kind)
    steps(optimizer, ours)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    torchs = torch.optim.AdamW(theirs, lr=0.01)
    torchs.load_state_dict(copy.deepcopy(optimizer.torch_state_dict()))
    optimizer.state_dtype = torch.float32
    steps(optimizer, ours, 1, first=4)
    steps(torchs, theirs, 1, first=4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    again, narrow = made(kind=kind)
    narrow.load_state_dict(torchs.state_dict())
    wide = narrow.fp32_state_dict()["state"]
    for i, own in torchs.state_dict()["state"].items():  # to nearest: half of the spacing
        for key in ("exp_avg", "exp_avg_sq"):
            error = (wide[i][key] - own[key]).abs().max() / own[key].abs().max()
            assert error <= (2**-8 if kind == torch.bfloat16 else 2**-5)
    steps(narrow, again, 1)


def test_torchs_optimizer_does_not_take_codes_for_moments():
    params, optimizer = made()
    steps(optimizer, params)
    torchs = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in params])
    torchs.load_state_dict(optimizer.state_dict())
    give_gradients(torchs.param_groups[0]["params"], seed=0)
    with pytest.raises(KeyError, match="exp_avg"):
        torchs.step()


def test_a_state_is_exactly_its_bytes():
    params, optimizer = made(torch.bfloat16, "8bit")
    steps(optimizer, params, 1)
    large, small = optimizer.state[params[1]], optimizer.state[params[2]]
    assert large["exp_avg"].nbytes == large["exp_avg_sq"].nbytes == 5000
    assert large["scales"].shape == (2, 157)
    assert small["exp_avg"].dtype == torch.float32
    assert "scales" not in small


def test_more_moments_later():
    params, optimizer = made(kind="8bit")
    steps(optimizer, params, 2)
    optimizer.param_groups[0]["amsgrad"] = True
    steps(optimizer, params, 2, first=2)
    assert optimizer.state[params[1]]["scales"].shape == (3, 157)
    wide = optimizer.fp32_state_dict()["state"][1]
    assert (wide["max_exp_avg_sq"] >= 0.9 * wide["exp_avg_sq"]).all()


# ---- special values, bad input ----


def test_a_block_with_a_nonfinite_value_is_nan_and_zeros_stay_zero():
    values = torch.zeros(96)
    values[40] = torch.inf
    values[70] = 1.0
    for quantity in Quantity:
        codes, scales = torch.empty(96, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)
        state_kinds.store(values, codes, quantity, scales, None)
        found = state_kinds.load(codes, quantity, scales)
        assert (found[:32] == 0).all()
        assert found[32:64].isnan().all()
        assert found[70] == 1
        least = 0.0 if quantity is Quantity.SIGNED else 2.0**-18
        assert (found[64:70] == least).all()  # a square beside others is never 0


@pytest.mark.parametrize("bad", ["4bit", torch.float16, 8, torch.uint8, [torch.bfloat16]])
def test_another_kind_is_refused(bad):
    params, optimizer = made()
    with pytest.raises(ValueError, match=r"state_dtype: expected None, torch\.float32"):
        adam_w(params, state_dtype=bad)
    with pytest.raises(ValueError, match="state_dtype: expected"):
        optimizer.state_dtype = bad
    assert optimizer.state_dtype == "8bit"


def test_8_bit_moments_without_scales_are_refused():
    params, optimizer = made()
    steps(optimizer, params)
    before = snapshot(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["scales"]
    with pytest.raises(ValueError, match=r"parameter 1 has 8 bits: expected scales of shape \(2, "):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer, params))
