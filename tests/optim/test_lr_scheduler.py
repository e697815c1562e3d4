"""The scheduler for loops written around torch's: none of the faults of torch's own."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmp
from fastmp import amp
from fastmp.optim.lr_scheduler import LRScheduler
from fastmp.schedule import Constant, Cosine, Cyclic, OneCycle, Warmup

pytestmark = pytest.mark.filterwarnings("error")
property_test = settings(max_examples=40, deadline=None, derandomize=True)

SCHEDULES = [
    OneCycle(0.1, 9),
    Cosine(0.1, 9),
    Warmup(Cyclic(0.1, 0.3, 4, base_momentum=0.8, max_momentum=0.9), 3),
]
OPTIMIZERS = {
    "torch": lambda p: torch.optim.SGD(p, lr=7.0, momentum=0.5),
    "torch adamw": lambda p: torch.optim.AdamW(p, lr=7.0),
    "tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(7.0), momentum=0.5),
    "fastmp": lambda p: fastmp.optim.SGD(p, lr=7.0, momentum=0.5),
    "fastmp adamw": lambda p: fastmp.optim.AdamW(p, lr=7.0),
}


def parameter():
    return torch.zeros(3, requires_grad=True)


def step(optimizer, value=1.0):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()


def values(optimizer):
    """(lr, momentum) of every group."""
    rows = []
    for group in optimizer.param_groups:
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        rows.append((float(group["lr"]), momentum))
    return rows


@pytest.mark.parametrize("made", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_has_the_values_of_the_schedule(kind, made):
    optimizer = OPTIMIZERS[kind]([parameter()])
    left_alone = values(optimizer)[0][1]
    scheduler = LRScheduler(optimizer, made)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    for k in range(25):  # far past the end: no error, no rebound
        lr, momentum = made(k)
        (got,) = values(optimizer)
        assert got == (pytest.approx(lr), left_alone if momentum is None else momentum)
        assert scheduler.last_epoch == k
        assert [*map(float, scheduler.get_last_lr())] == [got[0]]
        assert [*map(float, scheduler.get_lr())] == [pytest.approx(lr)]
        step(optimizer)
        scheduler.step()


@property_test
@given(steps=st.integers(2, 60), pct_start=st.floats(0.05, 0.9))
def test_one_cycle_steps_as_torch_does(steps, pct_start):
    if pct_start * steps <= 1:
        return  # torch divides by zero, or by less
    rows = []
    for make in (
        lambda o: LRScheduler(o, OneCycle(0.4, steps, pct_start)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.4, total_steps=steps, pct_start=pct_start
        ),
    ):
        optimizer = torch.optim.SGD([parameter()], lr=1.0, momentum=0.9)
        scheduler = make(optimizer)
        seen = []
        for k in range(steps):
            seen += values(optimizer)[0]
            step(optimizer)
            if k + 1 < steps:
                scheduler.step()
        rows.append(seen)
    assert rows[0] == pytest.approx(rows[1], rel=1e-9)


def test_where_torch_divides_by_zero():
    theirs = torch.optim.SGD([parameter()], lr=1.0, momentum=0.9)
    with pytest.raises(ZeroDivisionError):
        torch.optim.lr_scheduler.OneCycleLR(theirs, 0.4, total_steps=10, pct_start=0.1)
    ours = torch.optim.SGD([parameter()], lr=1.0, momentum=0.9)
    LRScheduler(ours, OneCycle(0.4, 10, 0.1))
    assert values(ours) == [(0.4, 0.85)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_that_come_later_get_the_lr_too(kind):
    optimizer = OPTIMIZERS[kind]([parameter()])
    made = OneCycle(0.1, 9)
    scheduler = LRScheduler(optimizer, made)
    step(optimizer)
    optimizer.add_param_group({"params": [parameter()], "lr_scale": 0.5})
    scheduler.step()
    lr, momentum = made(1)
    assert values(optimizer) == [
        (pytest.approx(lr), momentum),
        (pytest.approx(lr / 2), momentum),
    ]
    assert len(scheduler.get_last_lr()) == len(scheduler.get_lr()) == 2


# ---- skipped steps ----


def test_a_skipped_step_of_a_fastmp_optimizer_does_not_count():
    optimizer = OPTIMIZERS["fastmp"]([parameter()])
    made = OneCycle(0.1, 9)
    scheduler = LRScheduler(optimizer, made)
    positions = []
    for value in (math.nan, 1.0, 1.0, math.inf, 1.0):
        step(optimizer, value)
        scheduler.step()
        positions.append(scheduler.last_epoch)
        assert values(optimizer) == [made(positions[-1])]
    assert positions == [0, 1, 2, 2, 3]


def test_another_optimizer_counts_calls_and_a_scaler_that_skips_warns_of_nothing():
    weight = parameter()
    optimizer = OPTIMIZERS["torch"]([weight])
    scheduler = LRScheduler(optimizer, OneCycle(0.1, 9))
    scaler = amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    weight.grad = torch.full_like(weight, math.inf)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert scheduler.last_epoch == 1
    assert not weight.detach().any()


@pytest.mark.parametrize("kind", ["torch", "fastmp"])
def test_a_second_scheduler_starts_at_its_own_beginning(kind):
    optimizer = OPTIMIZERS[kind]([parameter()])
    for made in (OneCycle(0.1, 5), Cosine(0.3, 7)):
        scheduler = LRScheduler(optimizer, made)
        for k in range(4):
            assert values(optimizer)[0][0] == made(k)[0]
            step(optimizer)
            scheduler.step()


@pytest.mark.parametrize("kind", ["torch", "fastmp"])
def test_an_explicit_step_is_gone_to_and_on_from(kind):
    optimizer = OPTIMIZERS[kind]([parameter()])
    made = OneCycle(0.1, 9)
    scheduler = LRScheduler(optimizer, made, last_epoch=3)
    assert values(optimizer) == [made(4)]
    scheduler.step(6)
    assert values(optimizer) == [made(6)]
    step(optimizer)
    scheduler.step()
    assert values(optimizer) == [made(7)]


# ---- saving and loading ----


def run(optimizer, scheduler, weight, count):
    seen = []
    for k in range(count):
        # every fourth gradient overflows: the fastmp optimizers skip there, torch's do not
        skips = k % 4 == 3 and hasattr(optimizer, "applied_steps")
        step(optimizer, math.nan if skips else 1.0 + k)
        scheduler.step()
        seen += [*values(optimizer)[0], *weight.detach().tolist()]
    return seen


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "scheduler last of all"])
@pytest.mark.parametrize("made", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumes_to_the_bit(kind, made, order):
    weight = parameter()
    optimizer = OPTIMIZERS[kind]([weight])
    scheduler = LRScheduler(optimizer, made)
    run(optimizer, scheduler, weight, 5)
    kept = pickle.dumps((optimizer.state_dict(), scheduler.state_dict(), weight.tolist()))
    wanted = run(optimizer, scheduler, weight, 8)

    saved, position, numbers = pickle.loads(kept)
    weight = torch.tensor(numbers, requires_grad=True)
    optimizer = OPTIMIZERS[kind]([weight])
    if order == "scheduler last of all":  # torch's would leave the first lr in the groups
        optimizer.load_state_dict(saved)
    scheduler = LRScheduler(optimizer, made)
    if order == "optimizer first":
        optimizer.load_state_dict(saved)
    scheduler.load_state_dict(position)
    if order == "scheduler first":
        optimizer.load_state_dict(saved)
    assert run(optimizer, scheduler, weight, 8) == wanted


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_pickled_scheduler_goes_on_with_its_own_optimizer(kind, before):
    weight = parameter()
    optimizer = OPTIMIZERS[kind]([weight])
    scheduler = LRScheduler(optimizer, OneCycle(0.1, 9))
    run(optimizer, scheduler, weight, before)
    again = pickle.loads(pickle.dumps(scheduler))
    own = again.optimizer.param_groups[0]["params"][0]
    wanted = run(optimizer, scheduler, weight, 5)
    assert run(again.optimizer, again, own, 5) == wanted


def test_the_state_is_plain_numbers(tmp_path):
    scheduler = LRScheduler(OPTIMIZERS["fastmp"]([parameter()]), OneCycle(0.1, 9))
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == state


@pytest.mark.parametrize(("old", "new"), [("torch", "fastmp"), ("fastmp", "torch")])
def test_a_run_can_move_to_the_other_kind_of_optimizer(old, new):
    made = OneCycle(0.1, 9)
    optimizer = OPTIMIZERS[old]([parameter()])
    scheduler = LRScheduler(optimizer, made)
    for _ in range(4):
        step(optimizer)
        scheduler.step()
    moved = OPTIMIZERS[new]([parameter()])
    resumed = LRScheduler(moved, made)
    resumed.load_state_dict(scheduler.state_dict())
    assert values(moved) == [made(4)]
    step(moved)
    resumed.step()
    assert values(moved) == [made(5)]


# ---- in company ----


@pytest.mark.parametrize("kind", ["torch", "fastmp"])
def test_torch_can_chain_it(kind):
    optimizer = OPTIMIZERS[kind]([parameter()])
    first, second = Constant(0.5), Cosine(0.1, 9)
    both = [LRScheduler(optimizer, made) for made in (first, second)]
    chained = torch.optim.lr_scheduler.SequentialLR(optimizer, both, milestones=[3])
    seen = []
    for _ in range(6):
        seen.append(values(optimizer)[0][0])
        step(optimizer)
        chained.step()
    assert seen == [0.5, 0.5, 0.5, *(second(k)[0] for k in range(3))]


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        LRScheduler(torch.nn.Linear(1, 1), Constant(0.1))
    optimizer = OPTIMIZERS["torch"]([parameter()])
    with pytest.raises(ValueError, match="last_epoch must be at least -1, got -2"):
        LRScheduler(optimizer, Constant(0.1), last_epoch=-2)
    with pytest.raises(ValueError, match=r"with 'last_epoch', got the keys \['param_groups'"):
        LRScheduler(optimizer, Constant(0.1)).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="Adagrad has neither"):
        LRScheduler(torch.optim.Adagrad([parameter()]), Constant(0.1, 0.9))
