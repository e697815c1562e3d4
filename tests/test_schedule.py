"""Schedules: torch's values where torch is right, sane ones where it is not."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmp import schedule
from fastmp.schedule import Constant, OneCycle, Warmup, scale_lr

property_test = settings(max_examples=80, deadline=None, derandomize=True)


def torch_one_cycle(steps, **arguments):
    """lr and momentum that torch's OneCycleLR sets for each of ``steps`` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, total_steps=steps, **arguments)
    rows = []
    for step in range(steps):
        group = optimizer.param_groups[0]
        rows.append((float(group["lr"]), float(group["momentum"])))
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rows


@property_test
@given(
    steps=st.integers(2, 120),
    pct_start=st.floats(0.05, 0.5),
    anneal=st.sampled_from(["cos", "linear"]),
    three_phase=st.booleans(),
    max_lr=st.floats(1e-5, 10.0),
    div_factor=st.floats(1.0, 100.0),
    final_div_factor=st.floats(1.0, 1e5),
)
def test_one_cycle_equals_torch(
    steps, pct_start, anneal, three_phase, max_lr, div_factor, final_div_factor
):
    if pct_start * steps <= 1 or (three_phase and 2 * pct_start * steps > steps + 1):
        return  # torch divides by zero or runs backwards here
    ours = OneCycle(
        max_lr,
        steps,
        pct_start,
        anneal,
        div_factor,
        final_div_factor,
        three_phase=three_phase,
    )
    theirs = torch_one_cycle(
        steps,
        max_lr=max_lr,
        pct_start=pct_start,
        anneal_strategy=anneal,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        three_phase=three_phase,
    )
    for step, (lr, momentum) in enumerate(theirs):
        got_lr, got_momentum = ours(step)
        assert math.isclose(got_lr, lr, rel_tol=1e-9, abs_tol=1e-12 * max_lr), step
        assert math.isclose(got_momentum, momentum, rel_tol=1e-9), step


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("steps", "pct_start"), [(1, 0.3), (10, 0.1), (10, 0.0), (2, 0.5)])
def test_a_climb_of_one_step_or_less_starts_at_the_peak(steps, pct_start, three_phase):
    one_cycle = OneCycle(0.4, steps, pct_start, three_phase=three_phase)
    assert one_cycle(0) == (0.4, 0.85)


def test_a_cycle_that_is_all_climb_ends_at_the_peak():
    assert OneCycle(0.4, 10, pct_start=1.0)(9) == (0.4, 0.85)


@property_test
@given(steps=st.integers(2, 50), beyond=st.integers(0, 1000))
def test_steps_past_the_end_have_the_final_rate(steps, beyond):
    one_cycle = OneCycle(0.4, steps, pct_start=0.3, div_factor=10, final_div_factor=100)
    lr, momentum = one_cycle(steps - 1 + beyond)
    assert math.isclose(lr, 0.4 / 1000)
    assert math.isclose(momentum, 0.95)


def test_momentum_is_left_alone_on_request():
    assert OneCycle(0.1, 10, base_momentum=None, max_momentum=None)(4)[1] is None
    assert Constant(0.1)(7) == (0.1, None)


def test_warmup_climbs_in_a_straight_line_and_then_starts_the_schedule():
    inner = OneCycle(1.0, 10, pct_start=0.0)
    warm = Warmup(inner, 4)
    assert [warm(step)[0] for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [warm(4 + step) for step in range(10)] == [inner(step) for step in range(10)]
    assert Warmup(inner, 0)(0) == inner(0)


@pytest.mark.parametrize("made", [Constant(0.1, 0.9), OneCycle(0.1, 9), Warmup(Constant(0.1), 3)])
def test_schedules_pickle(made):
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert again(2) == made(2)


def test_scale_lr():
    assert scale_lr(0.1, 1024) == pytest.approx(0.4)
    assert scale_lr(0.1, 1024, rule="sqrt") == pytest.approx(0.2)
    assert scale_lr(0.1, 64, base_batch_size=128) == pytest.approx(0.05)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_apply_writes_every_group(kind, tensor_lr):
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    lr = torch.tensor(0.5) if tensor_lr else 0.5
    optimizer = getattr(torch.optim, kind)([{"params": [p]} for p in parameters], lr=lr)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule.apply(optimizer, 0.25, 0.6)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        assert float(group["lr"]) == 0.25
        assert (group["lr"] is old) == tensor_lr
        if kind == "Adam":
            assert group["betas"] == (0.6, 0.999)
        else:
            assert group["momentum"] == 0.6
    schedule.apply(optimizer, 0.125, None)
    assert optimizer.param_groups[1].get("momentum", 0.6) == 0.6
    assert float(optimizer.param_groups[1]["lr"]) == 0.125


def test_apply_refuses_a_momentum_that_has_no_place():
    optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match="Adagrad has neither 'betas' nor 'momentum'"):
        schedule.apply(optimizer, 0.1, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneCycle(-1.0, 10), "max_lr must be finite and at least 0, got -1.0"),
        (lambda: OneCycle(math.nan, 10), "max_lr must be finite"),
        (lambda: OneCycle(0.1, 0), "total_steps must be at least 1, got 0"),
        (lambda: OneCycle(0.1, 10, pct_start=1.5), r"pct_start must lie in \[0, 1.0\]"),
        (lambda: OneCycle(0.1, 10, 0.6, three_phase=True), r"pct_start must lie in \[0, 0.5\]"),
        (lambda: OneCycle(0.1, 10, anneal="exp"), "anneal must be 'cos' or 'linear', got 'exp'"),
        (lambda: OneCycle(0.1, 10, div_factor=0), "div_factor must be above 0"),
        (lambda: OneCycle(0.1, 10, final_div_factor=-1), "final_div_factor must be above 0"),
        (lambda: OneCycle(0.1, 10, base_momentum=1.0), r"base_momentum must lie in \[0, 1\)"),
        (lambda: OneCycle(0.1, 10, base_momentum=None), "must both be numbers or both be None"),
        (lambda: OneCycle(0.1, 10)(-1), "step must be at least 0, got -1"),
        (lambda: Constant(-0.1), "lr must be finite and at least 0"),
        (lambda: Warmup(Constant(0.1), -1), "steps must be at least 0"),
        (lambda: scale_lr(0.1, 0), "batch_size must be at least 1, got 0"),
        (lambda: scale_lr(0.1, 1, 0), "base_batch_size must be at least 1"),
        (lambda: scale_lr(0.1, 1, rule="cubic"), "rule must be 'linear' or 'sqrt', got 'cubic'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
