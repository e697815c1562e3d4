"""Rates in the groups beside a bound schedule: not used, and a warning says so."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from fastmp.optim.lr_scheduler import LRScheduler
from fastmp.schedule import Cosine, Cyclic, OneCycle
from tests.optim.test_schedule_place import MADE, model_and, step

UNUSED = "lr in the groups is shown, that of the bound schedule is used. Leave the scheduler out"


def torchs(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def ours(optimizer):
    return LRScheduler(optimizer, Cosine(0.5, 9))


@pytest.mark.parametrize("scheduler", [torchs, ours])
@pytest.mark.parametrize("first", ["scheduler", "schedule"])
def test_a_scheduler_beside_a_bound_schedule_is_warned_of_once(scheduler, first):
    _, optimizer = model_and("SGD", bound=False)
    parts = [lambda: scheduler(optimizer), lambda: MADE.bind(optimizer)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = [part() for part in (parts if first == "scheduler" else reversed(parts))]
        for seed in range(3):
            step(optimizer, seed)
            next(filter(None, made)).step()
        MADE.bind(optimizer)
    (warning,) = caught
    assert re.search(UNUSED, str(warning.message))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_rate_that_is_edited_beside_a_bound_schedule_is_warned_of(tensor_lr):
    _, optimizer = model_and("SGD", bound=False)
    group = optimizer.param_groups[0]
    if tensor_lr:
        group["lr"] = torch.tensor(1.0)
    MADE.bind(optimizer)
    step(optimizer)
    if tensor_lr:
        group["lr"].fill_(0.25)
    else:
        group["lr"] = 0.25
    with pytest.warns(UserWarning, match=UNUSED):
        step(optimizer)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_momentum_that_is_edited_beside_that_of_a_schedule_is_warned_of(name):
    _, optimizer = model_and(name, bound=False)
    group = optimizer.param_groups[0]
    OneCycle(0.1, 12).bind(optimizer)
    step(optimizer)
    group.update({"betas": (0.5, 0.9)} if name == "AdamW" else {"momentum": 0.5})
    with pytest.warns(UserWarning, match="the momentum in the groups is shown, that of the bound"):
        step(optimizer)


def test_a_momentum_beside_a_schedule_without_one_is_used():
    model, optimizer = model_and("SGD")
    optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
        step(optimizer)
    grad, buffer = model.weight.grad, optimizer.state[model.weight]["momentum_buffer"]
    torch.testing.assert_close(buffer, 1.5 * grad)


def test_other_changes_are_not_warned_of():
    """Another schedule, more groups, a copy, a load, no schedule: the rate is the one asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = model_and("SGD")
        step(optimizer)
        Cyclic(0.1, 0.2, 3).bind(optimizer, 9)
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "lr": 3.0})
        step(optimizer)
        for each in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            step(each)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        optimizer.load_state_dict(saved)
        step(optimizer)
        optimizer.clear_schedule()
        optimizer.param_groups[0]["lr"] = 0.75
        step(optimizer)
    assert model.weight.isfinite().all()
