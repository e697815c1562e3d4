"""The optimizers' state, their face and their errors, against torch's."""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

import fastmp
from tests.optim.optim_cases import (
    adam_w,
    case,
    give_gradients,
    parameters,
    same_bits,
    snapshot,
)

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


def test_loading_leaves_the_context_of_the_step_alone():
    """Shards stay attached when a checkpoint is loaded into their optimizer."""
    optimizer = adam_w(parameters())
    optimizer.step_context.reduce_step = reducer = object()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.step_context.reduce_step is reducer
    copied = pickle.loads(pickle.dumps(adam_w(parameters())))
    assert copied.step_context.reduce_step is None


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


@pytest.mark.parametrize("how", ["held dict", "saved dict", "new dict", "new state", "added"])
def test_replaced_state_is_noticed_whoever_holds_it(how):
    """Steps look for it from the first use of ``state`` on."""
    ours, theirs = parameters(), parameters()
    a, b = adam_w(ours), torch.optim.AdamW(theirs)
    held = []
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
        assert a._state_is_shared == (step > 1)
        for optimizer, params in ((a, ours), (b, theirs)) if step else ():
            if step == 1:
                saved = optimizer.state_dict()["state"] if how == "saved dict" else optimizer.state
                held.append(saved[0 if how == "saved dict" else params[0]])
                continue
            own = held[0 if optimizer is a else 1]
            zeros = torch.zeros_like(params[0])
            if how == "new dict":
                optimizer.state[params[0]] = {**optimizer.state[params[0]], "exp_avg": zeros}
            elif how == "new state":
                copied = {p: dict(s) for p, s in optimizer.state.items()}
                copied[params[0]]["exp_avg"] = zeros
                optimizer.state = defaultdict(dict, copied)
            else:
                own["exp_avg"] = zeros
                if how == "added":
                    own["note"] = torch.ones(())
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
    with pytest.raises(ValueError, match="max_grad_norm: expected a number above 0, got -1"):
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


def test_parameters_on_the_same_memory_are_refused():
    memory = torch.ones(100)
    parts = [memory[:40], memory[40:40], memory[40:80].view(4, 10), memory[80:]]
    apart = [part.requires_grad_() for part in parts]
    give_gradients(apart, seed=0)
    adam_w(apart).step()
    head, embedding = torch.nn.Linear(10, 4, bias=False), torch.nn.Embedding(4, 10)
    head.weight.data = embedding.weight.data  # tied in memory, and still two parameters
    for shared in ([head.weight, embedding.weight], [apart[3], apart[2], memory[70:75]]):
        params = [p.detach().requires_grad_() for p in shared]
        before = [p.detach().clone() for p in params]
        optimizer = adam_w(params)
        give_gradients(params, seed=0)
        with pytest.raises(ValueError, match=r"parameters (0 and 1|1 and 2) share memory"):
            optimizer.step()
        assert same_bits(before, params)


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
