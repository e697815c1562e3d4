"""The place in a schedule: after loads of all kinds, in steps and in epochs."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import fastmp
from fastmp.optim.lr_scheduler import LRScheduler
from fastmp.schedule import Constant, Cosine, OneCycle, Warmup
from tests.optim.optim_cases import give_gradients

NAMES = ["Adam", "AdamW", "SGD", "Lion"]
MADE = OneCycle(0.1, 12, base_momentum=None, max_momentum=None)
OPTIONS = {"AdamW": {"weight_decay": 0.5}, "SGD": {"momentum": 0.9, "weight_decay": 0.5}}


def model_and(name, dtype=torch.float32, bound=True):
    model = torch.nn.Linear(5, 3).to(dtype)
    options = OPTIONS.get(name, {})
    optimizer = getattr(fastmp.optim, name)(model.parameters(), lr=1.0, **options)
    if bound:
        MADE.bind(optimizer)
    return model, optimizer


def step(optimizer, seed=0, skip=False):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    give_gradients(params, seed=seed)
    if skip:
        params[0].grad.fill_(torch.inf)
    optimizer.step()


def used_lr(optimizer):
    """The rate of the next step, by a weight of its own under plain SGD's rule."""
    probe = fastmp.optim.SGD([p := torch.zeros(1, requires_grad=True)], lr=1.0)
    probe._schedule = optimizer._schedule
    probe.applied_steps.copy_(optimizer.applied_steps)
    p.grad = torch.ones(1)
    probe.step()
    return -p.item()


# ---- states that other code saves and loads ----


def through_dcp(model, optimizer, new_model, new):
    """As the tutorial of ``torch.distributed.checkpoint`` does; it takes a step to make state."""
    weights, saved = dcp.get_state_dict(model, optimizer)
    saved = copy.deepcopy((weights, saved))
    own = dcp.get_state_dict(new_model, new)  # what dcp.load would read into
    assert {*own[1]["state"]} == {*saved[1]["state"]}
    dcp.set_state_dict(new_model, new, model_state_dict=saved[0], optim_state_dict=saved[1])


def through_full_dcp(model, optimizer, new_model, new):
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, saved = dcp.get_state_dict(model, optimizer, options=options)
    dcp.set_state_dict(
        new_model, new, model_state_dict=weights, optim_state_dict=saved, options=options
    )


def without_counts(model, optimizer, new_model, new):
    new_model.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    new.load_state_dict({key: saved[key] for key in ("state", "param_groups")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [through_dcp, through_full_dcp, without_counts])
def test_the_rate_is_right_after_other_codes_load(way, name, dtype):
    model, optimizer = model_and(name, dtype)
    for seed in range(7):
        step(optimizer, seed, skip=seed == 3)
    new_model, new = model_and(name, dtype)
    way(model, optimizer, new_model, new)
    assert new.applied_steps == optimizer.applied_steps == 6
    assert used_lr(new) == pytest.approx(MADE(6)[0])
    for each in (optimizer, new):
        step(each, 7)
    for a, b in zip(model.parameters(), new_model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_the_step_that_makes_state_changes_no_weight(name, tensor_lr):
    """Its lr is 0; weight decay by the bound schedule's would shrink them."""
    model, optimizer = model_and(name, bound=False)
    if tensor_lr:
        optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    MADE.bind(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.get_optimizer_state_dict(model, optimizer)
        assert all(map(torch.equal, before, model.parameters()))
        step(optimizer)
    assert not torch.equal(before[0], model.weight)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_torchs_state_says_how_many_steps_there_were(name):
    model = torch.nn.Linear(5, 3)
    theirs = getattr(torch.optim, name)(model.parameters())
    for seed in range(5):
        step(theirs, seed)
    _, ours = model_and(name)
    step(ours)
    ours.load_state_dict(theirs.state_dict())
    assert ours.applied_steps == 5
    ours.load_state_dict(getattr(torch.optim, name)(model.parameters()).state_dict())
    assert ours.applied_steps == 0


def test_torchs_sgd_says_nothing_and_the_count_stays():
    theirs = torch.optim.SGD(torch.nn.Linear(5, 3).parameters(), momentum=0.9)
    step(theirs)
    _, ours = model_and("SGD")
    for seed in range(3):
        step(ours, seed)
    ours.load_state_dict(theirs.state_dict())
    assert ours.applied_steps == 3


def test_a_parameter_that_came_late_does_not_hold_the_count_back():
    early, late = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = fastmp.optim.AdamW([late, early])
    for seed in range(4):
        give_gradients([early, late][: 1 + seed // 2], seed=seed)
        optimizer.step()
    saved = optimizer.state_dict()
    del saved["counts"]
    new = fastmp.optim.AdamW([torch.ones(2, requires_grad=True) for _ in range(2)])
    new.load_state_dict(saved)
    assert new.applied_steps == 4


# ---- the scheduler's state ----


@pytest.mark.parametrize("unit", [None, "steps", "epochs"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_schedulers_state_with_a_fresh_optimizer_is_as_on_torchs(name, unit):
    rates = []
    for module in (fastmp.optim, torch.optim):
        seen, saved = [], None
        for count in (7, 5):
            optimizer = getattr(module, name)([torch.zeros(3, requires_grad=True)], lr=1.0)
            scheduler = LRScheduler(optimizer, MADE, unit=unit)
            if saved is not None:
                scheduler.load_state_dict(saved)
            for seed in range(count):
                seen.append(optimizer.param_groups[0]["lr"])
                step(optimizer, seed)
                scheduler.step()
            saved = pickle.loads(pickle.dumps(scheduler.state_dict()))
        rates.append(seen)
    assert rates[0] == rates[1] == [MADE(k)[0] for k in range(12)]


@pytest.mark.parametrize("order", ["optimizer", "scheduler"])
def test_a_save_between_the_two_steps_loses_none(order):
    """Saved after ``optimizer.step()``, before ``scheduler.step()``, as within a callback."""
    _, optimizer = model_and("AdamW", bound=False)
    scheduler = LRScheduler(optimizer, MADE)
    for seed in range(4):
        step(optimizer, seed)
        if seed < 3:
            scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    _, optimizer = model_and("AdamW", bound=False)
    scheduler = LRScheduler(optimizer, MADE)
    loads = [optimizer.load_state_dict, scheduler.load_state_dict]
    pairs = list(zip(loads, saved, strict=True))
    for load, state in pairs if order == "optimizer" else reversed(pairs):
        load(state)
    scheduler.step()
    assert scheduler.last_epoch == 4
    step(optimizer)
    scheduler.step()
    assert scheduler.last_epoch == 5


def warm_then_fall(optimizer):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)
    fall = LRScheduler(optimizer, Cosine(0.1, 9))
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], milestones=[3])


def fall_then_rise(optimizer):
    fall, rise = (
        LRScheduler(optimizer, Cosine(0.1, 9)),
        LRScheduler(optimizer, Warmup(Constant(0.2), 4)),
    )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [fall, rise], milestones=[3])


@pytest.mark.parametrize("order", ["optimizer", "scheduler"])
@pytest.mark.parametrize("cut", range(1, 7))
@pytest.mark.parametrize("make", [warm_then_fall, fall_then_rise])
def test_a_sequence_of_torchs_resumes_in_either_order(make, cut, order):
    """Before, at and after the milestone: only the part whose turn it is writes its rate."""

    def run(resumed):
        seen = []
        _, optimizer = model_and("AdamW", bound=False)
        scheduler = make(optimizer)
        for seed in range(9):
            if resumed and seed == cut:
                saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                _, optimizer = model_and("AdamW", bound=False)
                scheduler = make(optimizer)
                loads = [optimizer.load_state_dict, scheduler.load_state_dict]
                pairs = list(zip(loads, saved, strict=True))
                for load, state in pairs if order == "optimizer" else reversed(pairs):
                    load(state)
            seen.append(optimizer.param_groups[0]["lr"])
            step(optimizer, seed)
            scheduler.step()
        return seen

    assert run(resumed=True) == run(resumed=False)


def test_a_position_of_numpys_is_saved_as_a_plain_number():
    _, optimizer = model_and("AdamW", bound=False)
    scheduler = LRScheduler(optimizer, MADE)
    scheduler.step(np.int64(3))
    assert type(scheduler.state_dict()["last_epoch"]) is int


def test_an_optimizer_that_is_loaded_alone_leaves_the_scheduler_where_it_is():
    _, other = model_and("AdamW", bound=False)
    for seed in range(9):
        step(other, seed)
    _, optimizer = model_and("AdamW", bound=False)
    scheduler = LRScheduler(optimizer, MADE)
    for _ in range(2):
        step(optimizer)
        scheduler.step()
    optimizer.load_state_dict(other.state_dict())
    step(optimizer)
    scheduler.step()
    assert scheduler.last_epoch == 3


# ---- steps and epochs ----


@pytest.mark.parametrize("kind", ["fastmp", "torch"])
@pytest.mark.parametrize(
    "made", [Cosine(0.1, 4), Warmup(Cosine(0.1, 3), 2), Constant(0.3)], ids=repr
)
def test_a_schedule_in_epochs_advances_once_an_epoch(kind, made):
    module = fastmp.optim if kind == "fastmp" else torch.optim
    optimizer = module.SGD([torch.zeros(3, requires_grad=True)], lr=1.0)
    scheduler = LRScheduler(optimizer, made, unit="epochs")
    for epoch in range(6):
        assert optimizer.param_groups[0]["lr"] == made(epoch)[0]
        for seed in range(3):
            step(optimizer, seed, skip=kind == "fastmp" and seed == epoch)
        scheduler.step()


def test_without_a_unit_one_call_an_epoch_is_refused():
    _, optimizer = model_and("SGD", bound=False)
    scheduler = LRScheduler(optimizer, Cosine(0.1, 4))
    for seed in range(3):
        step(optimizer, seed)
    before = scheduler.state_dict()
    with pytest.raises(RuntimeError, match="got 3: pass unit='epochs' if the schedule counts"):
        scheduler.step()
    assert scheduler.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_schedule_in_steps_is_at_the_right_one_however_rarely_it_is_asked():
    _, optimizer = model_and("SGD", bound=False)
    scheduler = LRScheduler(optimizer, MADE, unit="steps")
    for seed in range(6):
        step(optimizer, seed, skip=seed == 1)
        if seed % 3 == 2:
            scheduler.step()
    assert scheduler.last_epoch == 5
    assert optimizer.param_groups[0]["lr"] == MADE(5)[0]


@pytest.mark.parametrize("unit", [None, "steps", "epochs"])
def test_the_unit_under_torchs_sequential_scheduler(unit):
    """Steps between two calls: one for a schedule in steps, two for one in epochs."""
    _, optimizer = model_and("SGD", bound=False)
    first, second = Constant(0.5), Cosine(0.1, 9)
    both = [LRScheduler(optimizer, made, unit=unit) for made in (first, second)]
    chained = torch.optim.lr_scheduler.SequentialLR(optimizer, both, milestones=[3])
    seen = []
    for seed in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        for _ in range(2 if unit == "epochs" else 1):
            step(optimizer, seed)
        chained.step()
    assert seen == [0.5, 0.5, 0.5, *(second(k)[0] for k in range(3))]


def test_another_unit_is_refused():
    _, optimizer = model_and("SGD", bound=False)
    with pytest.raises(ValueError, match="unit must be 'steps' or 'epochs', got 'batches'"):
        LRScheduler(optimizer, MADE, unit="batches")
