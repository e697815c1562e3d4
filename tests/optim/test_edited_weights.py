"""Weights changed from outside between steps: the weight that is there is the truth."""

import pytest
import torch

import fastmp
from tests.optim.optim_cases import adam_w, give_gradients, parameters, same_bits, steps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIMIZERS = {
    "AdamW": {},
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "Lion": {},
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def in_place(param, value):
    with torch.no_grad():
        param.copy_(value)


def past_autograd(param, value):
    param.data.copy_(value)


def load(param, value):
    module = torch.nn.Module()
    module.register_buffer("weight", param)
    module.load_state_dict({"weight": value})


routes = pytest.mark.parametrize("route", [in_place, past_autograd, load])


def beside_torch(name, ours):
    """An optimizer of these parameters; fp32 copies of them, and torch's optimizer of those."""
    theirs = [p.detach().float().requires_grad_() for p in ours]
    reference = fastmp.optim.Lion if name == "Lion" else getattr(torch.optim, name)
    own = getattr(fastmp.optim, name)(ours, lr=1e-2, **OPTIMIZERS[name])
    return own, theirs, reference(theirs, lr=1e-2, **OPTIMIZERS[name])


def edit_some(ours, theirs, route, seed):
    """About a third of the elements of both."""
    for p, q in zip(ours, theirs, strict=True):
        chosen = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        route(p, torch.where(chosen, 5.0 + seed, p.detach()))
        in_place(q, torch.where(chosen, 5.0 + seed, q.detach()))


def assert_masters(optimizer, expected):
    expected = [q.detach() for q in expected]
    torch.testing.assert_close(optimizer.masters(), expected, rtol=1e-5, atol=1e-6)


def weight(values, dtype):
    return torch.nn.Parameter(torch.as_tensor(values).to(dtype))


@dtypes
@optimizers
@routes
def test_zeroed_weights_are_zero(dtype, name, route):
    """All but every third: at 1.1 and at -1.1, with remainders and masters of both signs."""
    p = weight([1.1, -1.1, 1.7, -1.7, 0.3, -0.3] * 7, dtype)
    optimizer = getattr(fastmp.optim, name)([p], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        give_gradients([p], seed=step)
        optimizer.step()
    kept = torch.arange(42) % 3 == 0
    route(p, p.detach() * kept)
    assert not optimizer.masters()[0][~kept].any()
    for key in optimizer.state[p].keys() & {"exp_avg", "momentum_buffer"}:
        optimizer.state[p][key].zero_()
    p.grad.zero_()
    optimizer.step()
    assert not p.detach()[~kept].any()
    assert not optimizer.masters()[0][~kept].any()
    assert p.detach()[kept].all()


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@routes
def test_any_edit_of_fp32_and_fp16_weights_is_as_in_torch(dtype, name, route):
    """Element by element: the others keep what their masters have beyond 16 bits."""
    ours = parameters(dtype)
    a, theirs, b = beside_torch(name, ours)
    for step in range(8):
        give_gradients(ours, theirs, seed=step)
        if step % 3 == 1:
            edit_some(ours, theirs, route, step)
        assert_masters(a, theirs)
        a.step()
        b.step()
    assert_masters(a, theirs)


@dtypes
def test_a_clamp_past_autograd_holds(dtype):
    p = weight([4.0, -4.0, 0.5], dtype)
    optimizer = fastmp.optim.SGD([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data.clamp_(-0.01, 0.01)
    optimizer.step()
    assert p.detach().abs().max() <= 0.0102


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_not_healed_by_its_master(dtype, value):
    p = weight([1.1, 1.7], dtype)
    optimizer = fastmp.optim.SGD([p], lr=1e-2)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data[0] = value
    torch.testing.assert_close(optimizer.masters()[0][0], torch.tensor(value), equal_nan=True)
    optimizer.step()
    assert p.detach().isfinite().tolist() == [False, True]


@dtypes
@routes
def test_a_skipped_step_leaves_an_edit_as_it_is(dtype, route):
    params = parameters(dtype)
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.step()
    for p in params:
        route(p, torch.where(p > 0, 0.0, p.detach()))
    before = [p.detach().clone() for p in params], optimizer.masters()
    params[3].grad[7] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert same_bits(before[0], [p.detach() for p in params])
    assert same_bits(before[1], optimizer.masters())


# ---- casts ----


def stepped(dtype, count=2):
    params = parameters(dtype)
    optimizer = adam_w(params, master="split")
    steps(optimizer, params, count)
    return params, optimizer


def cast(params, dtype):
    for p in params:
        p.grad, p.data = None, p.data.to(dtype)


def in_fp16(values):
    """Masters that fp16 weights with remainders can be; see docs/state.md."""
    return {"expected": values, "rtol": 2**-26, "atol": 2**-41}


def edit(params):
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_before_a_cast_holds(dtype):
    params, optimizer = stepped(dtype)
    edit(params)
    edited = [p.detach().float() for p in params]
    cast(params, torch.float32)
    assert same_bits(optimizer.masters(), edited)
    assert same_bits([p.detach() for p in params], edited)


def test_a_mask_before_a_cast_leaves_the_other_weights_their_remainders():
    params, optimizer = stepped(torch.bfloat16)
    for seed in range(2):
        for p in params:
            in_place(p, torch.where(p > 0, p.detach(), 0.0))
        masters = optimizer.masters()
        expected = [torch.where(p > 0, m, 0.0) for p, m in zip(params, masters, strict=True)]
        if not seed:  # the first edit drops all remainders
            steps(optimizer, params, 1)
    assert not same_bits(expected, [p.detach().float() for p in params])
    cast(params, torch.float32)
    assert same_bits([m + 0.0 for m in optimizer.masters()], expected)


def test_a_cast_is_no_edit():
    """Of bf16 weights to fp16, whose remainders have the bits that the cast leaves."""
    params, optimizer = stepped(torch.bfloat16)
    before = optimizer.masters()
    cast(params, torch.float16)
    torch.testing.assert_close(optimizer.masters(), **in_fp16(before))
    optimizer.param_groups[0]["lr"] = 0.0
    steps(optimizer, params, 1)
    torch.testing.assert_close(optimizer.masters(), **in_fp16(before))


def test_a_cast_of_weights_whose_masters_were_loaded_is_no_edit():
    params, optimizer = stepped(torch.bfloat16, count=0)
    fine = [p.detach().float() * 1.001 for p in params]
    optimizer.load_masters(fine)
    cast(params, torch.float16)
    torch.testing.assert_close(optimizer.masters(), **in_fp16(fine))


def test_a_checksum_of_weights_before_a_cast_is_forgotten():
    """It came with a state that had no remainders, and fp16 weights had masters meanwhile."""
    params = parameters(torch.bfloat16)
    optimizer = adam_w(params)
    optimizer.load_state_dict(optimizer.state_dict())
    cast(params, torch.float16)
    steps(optimizer, params, 1)
    before = optimizer.masters()
    cast(params, torch.bfloat16)
    assert same_bits(optimizer.masters(), before)
    assert same_bits(optimizer.masters(), before)


def test_an_edit_after_two_casts_is_seen():
    params, optimizer = stepped(torch.float16)
    edit(params)
    steps(optimizer, params, 1)
    for dtype in (torch.float32, torch.float16):
        cast(params, dtype)
        steps(optimizer, params, 1)
    edit(params)
    assert same_bits(optimizer.masters(), [p.detach().float() for p in params])
    steps(optimizer, params, 1)


# ---- the reference ----


def test_the_reference_takes_edits_as_the_kernel_does():
    """Weights with gaps have no kernel."""

    def run(gaps):
        whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).half()
        p = (whole[:, ::2] if gaps else whole[:, ::2].contiguous()).requires_grad_()
        optimizer = fastmp.optim.SGD([p], lr=1e-3)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
            p.data.clamp_(-0.5, 0.5)
        assert (optimizer._tables.table.fallback is not None) == gaps
        return optimizer.masters()

    assert same_bits(run(True), run(False))
