"""The optimizers' steps against torch's; clipping, overflow, strides, groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastmp
from tests.optim.optim_cases import (
    CASES,
    adam_w,
    case,
    give_gradients,
    masters,
    parameters,
    same_bits,
    snapshot,
)

# ---- against torch.optim ----


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_100_steps_equal_torchs(name, options, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    a = getattr(fastmp.optim, name)(ours, lr=1e-2, **options)
    b = getattr(torch.optim, name)(theirs, lr=1e-2, **options)
    for step in range(100):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert a.applied_steps == 100


@case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_100_steps_with_masters_equal_torchs_in_fp32(name, options, dtype):
    ours = parameters(dtype)
    theirs = [p.detach().float().requires_grad_() for p in ours]
    a = getattr(fastmp.optim, name)(ours, lr=1e-2, **options)
    b = getattr(torch.optim, name)(theirs, lr=1e-2, **options)
    for step in range(100):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    kept = masters(a, ours)
    torch.testing.assert_close(kept, [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)
    for p, master in zip(ours, kept, strict=True):
        if dtype == torch.float16:
            assert torch.equal(p, master.to(dtype))
        else:  # ties apart, the weight is the master's rounding
            assert torch.equal((p - master).abs(), (master.to(dtype) - master).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_updates_are_not_lost(dtype):
    """1,000 steps of 1e-5 of the weight: in 16 bits without a master none of them would show."""
    p = torch.ones(64, dtype=dtype, requires_grad=True)
    optimizer = fastmp.optim.SGD([p], lr=1e-5)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert masters(optimizer, [p])[0].sub(0.99).abs().max() < 1e-4
    assert p.float().sub(0.99).abs().max() < 4e-3


@given(
    shapes=st.lists(st.lists(st.integers(0, 17), max_size=3), min_size=1, max_size=5),
    options=st.sampled_from(CASES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1024.0, 65536.0]),
    norm=st.sampled_from([None, 1e-4, 0.5, 1e6]),
    seed=st.integers(0, 1000),
)
def test_kernel_against_the_fp64_reference(shapes, options, dtype, scale, norm, seed):
    name, kwargs = options
    ours = parameters(dtype, shapes, seed)
    exact = [p.detach().double().requires_grad_() for p in ours]
    a = getattr(fastmp.optim, name)(ours, lr=0.1, max_grad_norm=norm, **kwargs)
    b = getattr(fastmp.optim, name)(exact, lr=0.1, max_grad_norm=norm, **kwargs)
    for step in range(3):
        give_gradients(ours, exact, scale=0.1, seed=seed + step)
        for optimizer in (a, b):
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
            del optimizer.grad_scale
    assert a._tables.table.fallback is None
    assert b._tables.table.fallback is not None
    torch.testing.assert_close(a.grad_norm.double(), b.grad_norm.double(), rtol=1e-6, atol=0)
    for master, p in zip(masters(a, ours), exact, strict=True):
        torch.testing.assert_close(master.double(), p.detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])  # Adam's step hardly feels a gradient's size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clipping_equals_clip_grad_norm(dtype, name):
    ours = parameters(dtype)
    theirs = [p.detach().float().requires_grad_() for p in ours]
    groups = [[{"params": p[:3], "lr": 0.1}, {"params": p[3:], "lr": 0.5}] for p in (ours, theirs)]
    a = getattr(fastmp.optim, name)(groups[0], max_grad_norm=0.7)
    b = getattr(torch.optim, name)(groups[1])
    for step in range(10):
        give_gradients(ours, theirs, seed=step)
        norm = torch.cat([p.grad.double().flatten() for p in theirs]).norm()
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm.double(), norm, rtol=1e-6, atol=0)
    expected = [p.detach() for p in theirs]
    torch.testing.assert_close(masters(a, ours), expected, rtol=1e-5, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads():
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params = parameters(torch.float16)
        optimizer = adam_w(params, max_grad_norm=0.1)
        for step in range(5):
            give_gradients(params, seed=step)
            optimizer.step()
        torch.set_num_threads(before)
        return [*snapshot(optimizer, params), optimizer.grad_norm.clone()]

    first = run(2)
    assert same_bits(first, run(1))
    assert same_bits(first, run(2))


# ---- overflow ----


def places(numel):
    """First, middle, last and both sides of every edge of a chunk of 16,384 elements."""
    edges = [e for chunk in range(16384, numel, 16384) for e in (chunk - 1, chunk)]
    return sorted({0, numel // 2, numel - 1, *edges})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_overflow_anywhere_changes_nothing(dtype, bad):
    params = parameters(dtype, [(3, 5), (1,), (0,), (33000,), (130, 130)])
    names = ["a", "b", "empty", "c", "d"]
    optimizer = adam_w(list(zip(names, params, strict=True)), amsgrad=True, max_grad_norm=1.0)
    give_gradients(params)
    optimizer.step()
    before = snapshot(optimizer, params)
    skipped = 0
    for name, p in zip(names, params, strict=True):
        for place in places(p.numel()) if p.numel() else []:
            give_gradients(params, seed=3)
            p.grad.view(-1)[place] = bad
            optimizer.step()
            skipped += 1
            assert same_bits(before, snapshot(optimizer, params))
            assert optimizer.found_inf == 1
            assert optimizer.nonfinite_param() == name
    assert optimizer.skipped_steps == skipped
    assert optimizer.applied_steps == 1
    give_gradients(params)
    optimizer.step()
    assert optimizer.found_inf == 0
    assert not same_bits(before, snapshot(optimizer, params))


def test_an_external_found_inf_skips_the_step():
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.skipped_steps == 1
    assert optimizer.found_inf == 1
    assert optimizer.nonfinite_param() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_skip_nonfinite_the_step_is_torchs(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    a, b = adam_w(ours, skip_nonfinite=False), torch.optim.AdamW(theirs)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        if step == 1:
            ours[0].grad[1, 2] = theirs[0].grad[1, 2] = torch.inf
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert ours[0].isnan().sum() == 1
    assert a.grad_norm.isnan()
    assert (a.applied_steps, a.skipped_steps) == (3, 0)
    # a scale or a norm to clip to needs the scan all the same
    before = [p.detach().clone() for p in ours]
    ours[1].grad[0] = torch.nan
    a.grad_scale = torch.tensor(2.0)
    a.step()
    del a.grad_scale
    a.max_grad_norm = 1.0
    a.step()
    assert a.skipped_steps == 2
    assert same_bits(before, [p.detach() for p in ours])


@pytest.mark.parametrize("scale", [0.0, torch.inf, torch.nan])
def test_an_unusable_scale_skips_the_step(scale):
    for dtype in (torch.float32, torch.float64):
        params = parameters(dtype)
        before = [p.detach().clone() for p in params]
        optimizer = adam_w(params)
        give_gradients(params)
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert same_bits(before, [p.detach() for p in params])


# ---- strides, subsets, groups ----


def test_channels_last_and_transposed_parameters():
    def build():
        torch.manual_seed(3)
        image = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
        matrix = torch.randn(6, 9).t()
        gaps = torch.randn(8, 10)[:, ::2]
        return [image.requires_grad_(), matrix.requires_grad_(), gaps.requires_grad_()]

    for count in (2, 3):  # the third is no dense memory: the reference takes that step
        ours, theirs = build()[:count], build()[:count]
        a, b = adam_w(ours), torch.optim.AdamW(theirs)
        for step in range(5):
            give_gradients(ours, theirs, seed=step)
            a.step()
            b.step()
        assert (a._tables.table.fallback is None) == (count == 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_of_another_stride_order_are_copied():
    p = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    q = p.detach().clone().requires_grad_()
    a, b = adam_w([p]), torch.optim.AdamW([q])
    p.grad = torch.randn(4, 3, 5, 7)
    q.grad = p.grad.clone()
    assert p.grad.stride() != p.stride()
    a.step()
    b.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradients_keep_their_own_count():
    ours, theirs = parameters(), parameters()
    a, b = adam_w(ours), torch.optim.AdamW(theirs)
    for step in range(12):
        give_gradients(ours, theirs, seed=step)
        for i in range(len(ours)):
            if (step + i) % 3 == 0:
                ours[i].grad = theirs[i].grad = None
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert a.state[p]["step"] == b.state[q]["step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernel, reference
def test_a_parameter_that_moves_to_another_group_takes_its_lr(dtype):
    params = [torch.zeros(2, dtype=dtype, requires_grad=True) for _ in range(3)]
    optimizer = fastmp.optim.SGD(
        [{"params": params[:2]}, {"params": params[2:], "lr": 2.0}], lr=1.0
    )
    for step in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 0:
            first, second = (group["params"] for group in optimizer.param_groups)
            second.insert(0, first.pop())  # the order of all parameters is the same
    assert [p[0].item() for p in params] == [-2.0, -3.0, -4.0]


def test_groups_join_later_and_mix_dtypes():
    ours = [*parameters(torch.float16, seed=1), *parameters(torch.float32, seed=2)]
    theirs = [p.detach().float().requires_grad_() for p in ours]
    a = fastmp.optim.SGD(ours[:7], lr=0.1, momentum=0.9)
    b = torch.optim.SGD(theirs[:7], lr=0.1, momentum=0.9)
    for step in range(6):
        if step == 3:
            for optimizer, params in ((a, ours), (b, theirs)):
                optimizer.add_param_group({"params": params[7:], "lr": 0.01, "momentum": 0.0})
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    expected = [p.detach() for p in theirs]
    torch.testing.assert_close(masters(a, ours), expected, rtol=1e-5, atol=1e-6)
