"""The constructors' signatures, numbers of NumPy, and what ``max_grad_norm`` takes."""

import inspect
import json

import numpy as np
import pytest
import torch

import fastmp
from fastmp import checkpoint
from fastmp.optim.lr_scheduler import LRScheduler
from fastmp.schedule import Cosine, OneCycle, scale_lr
from tests.optim.optim_cases import give_gradients, parameters, same_bits, snapshot

NAMES = ["Adam", "AdamW", "SGD", "Lion"]
OURS = {
    "max_grad_norm": None,
    "skip_nonfinite": True,
    "ema": None,
    "state_dtype": None,
    "master": None,
}
NUMBERS = {
    "float64": np.float64,
    "float32": np.float32,
    "0-d array": np.array,
}
numbers = pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_signature_is_torchs_and_then_ours(name):
    ours, theirs = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(module, name)).parameters.values()
        ]
        for module in (fastmp.optim, torch.optim)
    )
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [
        (name, inspect.Parameter.KEYWORD_ONLY, default) for name, default in OURS.items()
    ]
    assert "self" not in dict.fromkeys(name for name, *_ in ours)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_arguments_by_position_and_by_name_arrive(name):
    given = {
        p.name: (0.25, 0.75) if p.name == "betas" else 0.5
        for p in inspect.signature(getattr(torch.optim, name)).parameters.values()
        if p.kind is not inspect.Parameter.KEYWORD_ONLY and p.name not in ("params", "amsgrad")
    }
    given |= {"amsgrad": True} if name != "SGD" else {"dampening": 0.0, "nesterov": True}
    groups = []
    for module in (fastmp.optim, torch.optim):
        for args, named in ((given.values(), {}), ((), given)):
            optimizer = getattr(module, name)(parameters(), *args, maximize=True, **named)
            groups.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    assert all(group == groups[0] for group in groups)
    assert groups[0]["maximize"]


# ---- numbers of NumPy ----


def only_plain(value):
    if isinstance(value, dict):
        return all(only_plain(item) for item in [*value, *value.values()])
    if isinstance(value, list | tuple):
        return all(map(only_plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@numbers
@pytest.mark.parametrize("name", NAMES)
def test_options_are_pythons_numbers(name, number, tmp_path):
    options = {"lr": number(1e-3), "weight_decay": number(0.25)}
    if name == "SGD":
        options["momentum"] = number(0.5)
    else:
        options["betas"] = (number(0.5), number(0.75))
    params = parameters()
    groups = [
        {"params": params[:3]},
        {"params": params[3:], "lr": number(0.5), "lr_scale": number(2.0)},
    ]
    optimizer = getattr(fastmp.optim, name)(groups, max_grad_norm=number(0.5), **options)
    assert type(optimizer.max_grad_norm) is float
    assert [group["lr"] for group in optimizer.param_groups] == [
        np.asarray(options["lr"]).item(),
        0.5,
    ]
    give_gradients(params)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= np.float64(0.5)  # as a scheduler with a lambda of NumPy's
    state = optimizer.state_dict()
    assert only_plain(state)
    torch.save(state, tmp_path / "torch")
    torch.load(tmp_path / "torch", weights_only=True)
    checkpoint.save(tmp_path / "ours", state)
    loaded = checkpoint.load(tmp_path / "ours")
    assert loaded["param_groups"] == state["param_groups"]


@numbers
def test_schedules_of_numpy(number):
    def schedule(step):
        return number(0.5 / (step + 1)), number(0.25)

    runs = []
    for bound in (True, False):
        params = parameters()
        optimizer = fastmp.optim.SGD(params, lr=1.0, momentum=0.5)
        if bound:
            optimizer.bind_schedule(schedule, np.int64(4))
        else:
            scheduler = LRScheduler(optimizer, schedule)
        for seed in range(4):
            give_gradients(params, seed=seed)
            optimizer.step()
            if not bound:
                scheduler.step()
                assert only_plain(optimizer.state_dict())
                assert only_plain(json.loads(json.dumps(scheduler.state_dict())))
                assert only_plain([scheduler.get_last_lr(), scheduler.get_lr()])
        runs.append(snapshot(optimizer, params))
    torch.testing.assert_close(*runs)
    optimizer = fastmp.optim.SGD(parameters(), lr=1.0, momentum=0.5)
    for made in (OneCycle(number(0.5), np.int64(5)), Cosine(number(0.5), np.int32(5))):
        optimizer.bind_schedule(made)
    assert type(scale_lr(np.float32(0.5), np.int64(512))) is float


@pytest.mark.parametrize("name", [*NAMES, "Muon"])
def test_a_parameter_that_is_in_a_group_twice_is_updated_once(name):
    make = getattr(fastmp.optim, name)
    twice, once = (parameters(shapes=[(300, 300), (7, 5)]) for _ in range(2))
    named = [("a", twice[0]), ("b", twice[1]), ("again", twice[0])]
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        first = make(named, lr=0.1, ema=0.5)
    assert first.param_groups[0]["param_names"] == ["a", "b"]
    second = make(once, lr=0.1, ema=0.5)
    for step in range(3):
        give_gradients(twice, once, seed=step)
        first.step()
        second.step()
    assert same_bits(snapshot(first, twice), snapshot(second, once))


# ---- max_grad_norm ----


@pytest.mark.parametrize("bad", [0, 0.0, -1, float("nan"), np.float32(0)])
def test_a_limit_that_is_not_above_zero_is_refused(bad):
    optimizer = fastmp.optim.SGD(parameters(), lr=1.0, max_grad_norm=2.0)
    refused = pytest.raises(ValueError, match="None means that gradients are not clipped")
    for name in NAMES:
        with refused:
            getattr(fastmp.optim, name)(parameters(), max_grad_norm=bad)
    with refused:
        optimizer.max_grad_norm = bad
    assert optimizer.max_grad_norm == 2.0
    with pytest.raises(ValueError, match="max_grad_norm: expected"):
        optimizer.set_schedule([0.1, 0.1], None, [1.0, bad])
    assert optimizer._schedule is None


@pytest.mark.parametrize("limit", [None, float("inf"), 1e-30])
def test_a_limit_that_is_one_is_taken(limit):
    optimizer = fastmp.optim.SGD(parameters(), lr=1.0, max_grad_norm=1.0)
    optimizer.max_grad_norm = limit
    assert optimizer.max_grad_norm == limit


@pytest.mark.parametrize("limit", [None, 1.5])
def test_repr_shows_the_norm_that_gradients_are_clipped_to(limit):
    optimizer = fastmp.optim.AdamW([torch.nn.Parameter(torch.ones(2))], max_grad_norm=limit)
    assert repr(optimizer).endswith(f"    weight_decay: 0.01\nmax_grad_norm: {limit}\n)")
