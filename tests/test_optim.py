"""The optimizers against torch's, and what they promise beyond them."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastmp
from fastmp.ops.update import join_master

SHAPES = [(3, 5), (1,), (0,), (16384,), (97, 173), (2, 3, 4, 5), (16385,)]
CASES = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("AdamW", {"betas": (0.5, 0.9), "eps": 1e-6}),
    # eps above the noise of g + wd p where the two cancel: Adam would divide noise by noise
    ("Adam", {"weight_decay": 0.1, "eps": 1e-4}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True}),
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
]
case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
adam_w = fastmp.optim.AdamW


def parameters(dtype=torch.float32, shapes=SHAPES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def give_gradients(*models, scale=1.0, seed=0):
    """The same random gradients to every list of parameters, in each one's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*models, strict=True):
        grad = torch.randn(params[0].shape, generator=generator) * scale
        grad = grad.to(params[0].dtype)
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def masters(optimizer, params):
    """The fp32 value behind every parameter."""
    found = []
    for p in params:
        state = optimizer.state[p]
        if "remainder" in state:
            found.append(join_master(p.detach(), state["remainder"]))
        else:
            found.append(state.get("master", p.detach()))
    return found


def snapshot(optimizer, params):
    state = [t.clone() for p in params for t in optimizer.state[p].values()]
    return [p.detach().clone() for p in params] + state


def same_bits(a, b):
    def bits(t):
        return t.contiguous().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


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
    norm=st.sampled_from([None, 0.0, 0.5, 1e6]),
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
    assert a._plan.fallback is None
    assert b._plan.fallback is not None
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
            assert optimizer.last_overflow() == name
    assert optimizer.skipped_steps == skipped
    assert optimizer.applied_steps == 1
    give_gradients(params)
    optimizer.step()
    assert optimizer.found_inf == 0
    assert not same_bits(before, snapshot(optimizer, params))


def test_an_overflow_that_somebody_else_saw_skips_the_step():
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.skipped_steps == 1
    assert optimizer.found_inf == 1
    assert optimizer.last_overflow() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trusting_the_gradients_is_torchs_behaviour(dtype):
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
    # with a scale, or a norm to clip to, it looks all the same
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
        assert (a._plan.fallback is None) == (count == 2)
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


# ---- state ----


@case
def test_state_travels_to_torch_and_back(name, options):
    ours, theirs = parameters(), parameters()
    a = getattr(fastmp.optim, name)(ours, lr=1e-2, **options)
    b = getattr(torch.optim, name)(theirs, lr=1e-2, **options)
    for step in range(12):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
        if step % 4 == 3:
            from_ours, from_theirs = copy.deepcopy((a.state_dict(), b.state_dict()))
            a.load_state_dict(from_theirs)
            b.load_state_dict(from_ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_saved_run_goes_on_to_the_bit(dtype, how):
    def steps(optimizer, params, first, last):
        for step in range(first, last):
            give_gradients(params, scale=1e-4, seed=step)
            optimizer.step()

    params = parameters(dtype)
    optimizer = adam_w(params, amsgrad=True, max_grad_norm=1.0)
    steps(optimizer, params, 0, 5)
    if how == "state_dict":
        copies = [p.detach().clone().requires_grad_() for p in params]
        restored = adam_w(copies, amsgrad=True, max_grad_norm=1.0)
        restored.load_state_dict(optimizer.state_dict())
    elif how == "pickle":
        restored = pickle.loads(pickle.dumps(optimizer))
    else:
        restored = copy.deepcopy(optimizer)
    copies = restored.param_groups[0]["params"]
    assert all(
        t.dtype in (torch.float32, torch.int16) for p in copies for t in restored.state[p].values()
    )
    assert same_bits(snapshot(optimizer, params), snapshot(restored, copies))
    steps(optimizer, params, 5, 10)
    steps(restored, copies, 5, 10)
    assert same_bits(snapshot(optimizer, params), snapshot(restored, copies))
    assert restored.max_grad_norm == 1.0


def test_moments_are_not_rounded_to_the_parameters_dtype():
    p = torch.ones(4, dtype=torch.float16, requires_grad=True)
    optimizer = adam_w([p])
    p.grad = torch.full_like(p, 1e-4)
    optimizer.step()  # v = 1e-3 * 1e-8: zero in fp16
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], state["state"][0]["exp_avg_sq"])
    assert optimizer.state[p]["exp_avg_sq"].min() > 0


def test_loading_does_not_share_memory_with_the_saved_state():
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other = adam_w(parameters())
    other.load_state_dict(saved)
    give_gradients(other.param_groups[0]["params"], seed=9)
    other.step()
    for key, values in kept["state"].items():
        assert same_bits(values.values(), saved["state"][key].values())


def test_state_hooks_see_and_may_change_the_state():
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()

    def double(_, state_dict):
        state = copy.deepcopy(state_dict)
        for values in state["state"].values():
            values["exp_avg"] *= 2
        return state

    loaded = []
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: loaded.append(o))
    expected = [v["exp_avg"] * 2 for v in saved["state"].values()]
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert same_bits(expected, [optimizer.state[p]["exp_avg"] for p in params])
    assert loaded == [optimizer]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_written_from_outside_are_kept(dtype):
    p = torch.ones(8, dtype=dtype, requires_grad=True)
    optimizer = fastmp.optim.SGD([p], lr=1e-4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p[:4] = 3.0
    fine = masters(optimizer, [p])[0][4:].clone()
    optimizer.step()
    master = masters(optimizer, [p])[0]
    # bf16 keeps the remainder of the old weight: at most half a unit in the last place of the new
    slack = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(master[:4], torch.full((4,), 3 - 1e-4), rtol=0, atol=slack)
    torch.testing.assert_close(master[4:], fine - 1e-4, rtol=0, atol=1e-7)


def test_replaced_state_and_replaced_data_are_noticed():
    ours, theirs = parameters(), parameters()
    a, b = adam_w(ours), torch.optim.AdamW(theirs)
    for step in range(6):
        if step == 2:
            for optimizer, params in ((a, ours), (b, theirs)):
                for p in params:
                    optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
        if step == 4:
            a.state.clear()
            b.state.clear()
            for p in (*ours, *theirs):
                p.data = p.data.clone()
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_state_that_no_longer_fits_is_brought_into_shape():
    def build():
        torch.manual_seed(4)
        return [torch.randn(4, 3, 5, 7).requires_grad_(), torch.randn(6, 5).requires_grad_()]

    ours, theirs = build(), build()
    a, b = adam_w(ours), torch.optim.AdamW(theirs)
    for step in range(6):
        give_gradients(ours, theirs, seed=step)
        if step == 2:  # the moments are contiguous, the weight no longer is
            for p in (ours[0], theirs[0]):
                p.data = p.data.to(memory_format=torch.channels_last)
        if step == 4:  # a kernel must not read fp64 as fp32
            for optimizer, params in ((a, ours), (b, theirs)):
                state = optimizer.state[params[1]]
                state["exp_avg"] = state["exp_avg"].double().float()
            a.state[ours[1]]["exp_avg_sq"] = a.state[ours[1]]["exp_avg_sq"].double()
            a.state[ours[1]]["step"] = 4
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_state_of_another_shape_is_refused_before_anything_changes():
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.step()
    before = snapshot(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["exp_avg"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 1: expected shape \(1,\), got"):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer, params))
    optimizer.state[params[0]]["exp_avg"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"'exp_avg': expected shape \(3, 5\), got \(2, 2\)"):
        optimizer.step()


# ---- the drop-in face ----


def test_isinstance_hooks_closure_and_zero_grad():
    params = parameters()
    optimizer = adam_w(params)
    assert isinstance(optimizer, torch.optim.AdamW)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == ["before", "after"]
    assert optimizer.applied_steps == 1
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    optimizer.step()  # nothing has a gradient: nothing to do
    assert optimizer.applied_steps == 1


def test_autograd_notices_the_step():
    p = torch.ones(3, requires_grad=True)
    optimizer = adam_w([p])
    loss = (p**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_trains_a_model_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = adam_w(model.parameters(), lr=1e-2)
    x, y = torch.randn(256, 20), torch.randint(4, (256,))
    losses = []
    for _ in range(100):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- bad input ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": -1.0}),
        ("AdamW", {"eps": -1.0}),
        ("AdamW", {"betas": (1.0, 0.9)}),
        ("AdamW", {"betas": (0.9, -0.1)}),
        ("Adam", {"weight_decay": -1.0}),
        ("AdamW", {"lr": torch.tensor([1.0, 2.0])}),
        ("SGD", {"lr": -1.0}),
        ("SGD", {"momentum": -0.1}),
        ("SGD", {"nesterov": True}),
    ],
)
def test_torchs_errors(name, options):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(torch.optim, name)(parameters(), **options)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(fastmp.optim, name)(parameters(), **options)
    assert str(ours.value) == str(theirs.value)


def test_errors_of_our_own():
    with pytest.raises(ValueError, match="max_grad_norm: expected a number >= 0, got -1"):
        adam_w(parameters(), max_grad_norm=-1)
    with pytest.raises(ValueError, match="max_grad_norm"):
        adam_w(parameters(), max_grad_norm=float("nan"))
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        adam_w(parameters(), differentiable=True)
    with pytest.raises(ValueError, match=r"dense fp32.*complex64"):
        adam_w([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    sparse = torch.eye(3).to_sparse().requires_grad_()
    with pytest.raises(ValueError, match="sparse_coo"):
        adam_w([sparse])
    optimizer = adam_w(parameters())
    with pytest.raises(ValueError, match="complex64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    dense = torch.ones(3, requires_grad=True)
    optimizer = adam_w([dense, *embedding.parameters()])
    before = dense.detach().clone()
    (embedding(torch.tensor([1, 2])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, before)


def test_parameters_on_two_devices_are_refused():
    here, there = torch.ones(3, requires_grad=True), torch.ones(3, device="meta").requires_grad_()
    optimizer = adam_w([here, there])
    here.grad, there.grad = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="on one device, got cpu, meta"):
        optimizer.step()


def test_a_gradient_that_no_longer_fits_is_refused():
    p = torch.ones(4, 3, requires_grad=True)
    optimizer = adam_w([p])
    p.grad = torch.ones(4, 3)
    optimizer.step()
    p.data = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).*got \(4, 3\)"):
        optimizer.step()


def test_state_of_another_shape_of_groups_is_refused():
    saved = adam_w(parameters()[:2]).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        adam_w(parameters()).load_state_dict(saved)
