"""Schedules: torch's values where torch is right, sane ones where it is not."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmp
from fastmp.optim import lr_scheduler
from fastmp.schedule import Constant, Cosine, Cyclic, OneCycle, Warmup, scale_lr

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


# ---- cosine ----


@property_test
@given(
    steps=st.integers(1, 200),
    lr=st.floats(1e-5, 10.0),
    final=st.floats(0.0, 1.0),
    beyond=st.integers(0, 1000),
)
def test_cosine_equals_torch_and_does_not_rebound(steps, lr, final, beyond):
    ours = Cosine(lr, steps, final_lr=final * lr, momentum=0.9)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=final * lr)
    for step in range(steps + 1):
        theirs.last_epoch = step
        (wanted,) = theirs._get_closed_form_lr()
        assert math.isclose(ours(step)[0], wanted, rel_tol=1e-12, abs_tol=1e-12 * lr), step
    assert ours(steps + beyond) == (final * lr, 0.9)


def test_cosine_wastes_no_step_and_starts_at_the_top():
    cosine = Cosine(0.4, 10)
    assert cosine(0) == (0.4, None)
    assert cosine(9)[0] > 0
    assert cosine(10)[0] == 0


# ---- cyclic ----


def torch_cyclic(steps, **arguments):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **arguments)
    rows = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        rows.append((float(group["lr"]), float(group["momentum"])))
        optimizer.step()
        scheduler.step()
    return rows


@property_test
@given(
    up=st.integers(1, 30),
    down=st.none() | st.integers(1, 30),
    mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
    gamma=st.floats(0.9, 1.0),
    base_lr=st.floats(0.0, 0.1),
    height=st.floats(0.0, 1.0),
)
def test_cyclic_equals_torch(up, down, mode, gamma, base_lr, height):
    arguments = {
        "base_lr": base_lr,
        "max_lr": base_lr + height,
        "step_size_up": up,
        "step_size_down": down,
        "mode": mode,
        "gamma": gamma,
        "base_momentum": 0.8,
        "max_momentum": 0.9,
    }
    ours = Cyclic(**arguments)
    for step, (lr, momentum) in enumerate(torch_cyclic(150, **arguments)):
        got_lr, got_momentum = ours(step)
        assert math.isclose(got_lr, lr, rel_tol=1e-9, abs_tol=1e-12), step
        assert math.isclose(got_momentum, momentum, rel_tol=1e-9), step


def test_cyclic_hits_its_feet_and_peaks_to_the_bit():
    cyclic = Cyclic(0.1, 0.7, 3, 7, base_momentum=0.8, max_momentum=0.9)
    for cycle in (0, 1, 123_457):
        assert cyclic(10 * cycle) == (0.1, 0.9)
        assert cyclic(10 * cycle + 3) == (0.1 + (0.7 - 0.1), 0.9 - (0.9 - 0.8))


def test_the_ceiling_of_cyclic_sinks():
    halving = Cyclic(0.0, 1.0, 2, mode="triangular2", base_momentum=0.5, max_momentum=0.9)
    assert [halving(2 + 4 * cycle)[0] for cycle in range(4)] == [1, 0.5, 0.25, 0.125]
    assert halving(6)[1] == pytest.approx(0.7)
    assert halving(4 * 5000 + 2) == (0.0, 0.9)  # torch: OverflowError
    fading = Cyclic(0.0, 1.0, 2, mode="exp_range", gamma=0.9)
    assert [fading(2 + 4 * cycle)[0] for cycle in range(3)] == [0.9**2, 0.9**6, 0.9**10]


# ---- all of them ----


def test_momentum_is_left_alone_on_request():
    assert OneCycle(0.1, 10, base_momentum=None, max_momentum=None)(4)[1] is None
    assert Constant(0.1)(7) == (0.1, None)


def test_warmup_climbs_in_a_straight_line_and_then_starts_the_schedule():
    inner = OneCycle(1.0, 10, pct_start=0.0)
    warm = Warmup(inner, 4)
    assert [warm(step)[0] for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [warm(4 + step) for step in range(10)] == [inner(step) for step in range(10)]
    assert Warmup(inner, 0)(0) == inner(0)


EVERY = [
    Constant(0.1, 0.9),
    OneCycle(0.1, 9),
    OneCycle(0.1, 9, three_phase=True),
    Cosine(0.1, 9, momentum=0.8),
    Cyclic(0.1, 0.3, 4, mode="triangular2", base_momentum=0.8, max_momentum=0.9),
    Warmup(Constant(0.1), 3),
    Warmup(Cosine(0.1, 9), 3),
    Warmup(Cyclic(0.1, 0.3, 4), 3),
]


@pytest.mark.parametrize("made", EVERY)
def test_schedules_pickle(made):
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert [again(step) for step in range(20)] == [made(step) for step in range(20)]


@pytest.mark.parametrize("made", [made for made in EVERY if made.length is not None])
def test_a_schedule_is_constant_from_its_length_on_and_not_before(made):
    last = made(made.length - 1)
    assert all(made(made.length - 1 + beyond) == last for beyond in (1, 2, 50))
    assert made.length == 1 or made(made.length - 2) != last


def test_lengths():
    assert Cyclic(0.1, 0.2).length is None
    assert Warmup(Cyclic(0.1, 0.2), 3).length is None
    assert Warmup(lambda step: (0.1, None), 3).length is None
    assert Warmup(Warmup(OneCycle(0.1, 9), 2), 3).length == 14


# ---- bind ----


def steps_of(optimizer, parameter, count, skip=()):
    """The weights after each step with gradient 1; a NaN at the steps named."""
    seen = []
    for step in range(count):
        parameter.grad = torch.full_like(parameter, math.nan if step in skip else 1.0)
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen


def fused(**options):
    parameter = torch.zeros(5, requires_grad=True)
    return fastmp.optim.SGD([parameter], lr=7.0, momentum=0.5, **options), parameter


@pytest.mark.parametrize("made", EVERY)
def test_binding_does_what_applying_every_step_does(made):
    bound, a = fused()
    applied, b = fused()
    made.bind(bound, 30 if made.length is None else None)
    got = steps_of(bound, a, 20, skip=(2, 9))
    wanted = []
    for step in range(20):
        lr_scheduler.apply(applied, *made(int(applied.applied_steps)))
        wanted += steps_of(applied, b, 1, skip=(0,) if step in (2, 9) else ())
    assert int(bound.skipped_steps) == 2
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert not torch.equal(got[0], torch.zeros(5))


def test_steps_cut_and_extend_a_table():
    made = Cosine(1.0, 4)
    for steps, wanted in ((2, [*map(made, range(2)), made(1), made(1)]), (50, map(made, range(4)))):
        optimizer, parameter = fused()
        optimizer.param_groups[0]["momentum"] = 0.0
        made.bind(optimizer, steps)
        weights = torch.stack([torch.zeros(5), *steps_of(optimizer, parameter, 4)])
        torch.testing.assert_close(-weights.diff(dim=0)[:, 0], torch.tensor([r[0] for r in wanted]))


def test_a_plain_function_can_be_bound():
    optimizer, parameter = fused()
    optimizer.bind_schedule(lambda step: (0.25, None), 3)
    assert steps_of(optimizer, parameter, 1)[0][0] == -0.25


@pytest.mark.parametrize(
    ("made", "steps", "message"),
    [
        (Cyclic(0.1, 0.2), None, "no length of its own: bind"),
        (Warmup(lambda step: (0.1, None), 3), None, "no length of its own"),
        (Constant(0.1), 0, "steps must be at least 1, got 0"),
        (Warmup(lambda step: (0.1, 0.9 if step else None), 1), 3, "None at 2 of 3"),
    ],
)
def test_bind_says_what_it_cannot_do(made, steps, message):
    optimizer, _ = fused()
    with pytest.raises(ValueError, match=message):
        made.bind(optimizer, steps)
    assert optimizer._schedule is None


def test_bind_sends_other_optimizers_to_the_scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(
        TypeError, match=r"got SGD; for others use fastmp.optim.lr_scheduler.LRScheduler"
    ):
        Constant(0.1).bind(optimizer)


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
    lr_scheduler.apply(optimizer, 0.25, 0.6)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        assert float(group["lr"]) == 0.25
        assert (group["lr"] is old) == tensor_lr
        if kind == "Adam":
            assert group["betas"] == (0.6, 0.999)
        else:
            assert group["momentum"] == 0.6
    lr_scheduler.apply(optimizer, 0.125, None)
    assert optimizer.param_groups[1].get("momentum", 0.6) == 0.6
    assert float(optimizer.param_groups[1]["lr"]) == 0.125


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_apply_respects_lr_scale(lr):
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    optimizer = torch.optim.SGD([groups[0], {**groups[1], "lr_scale": 0.25}], lr=lr)
    for _ in range(2):  # it does not pile up
        lr_scheduler.apply(optimizer, 0.5, None)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.125]


def test_apply_refuses_a_momentum_that_has_no_place():
    optimizer = torch.optim.Adagrad([torch.zeros(1, requires_grad=True)], lr=0.5)
    with pytest.raises(ValueError, match="Adagrad has neither 'betas' nor 'momentum'"):
        lr_scheduler.apply(optimizer, 0.1, 0.9)
    assert optimizer.param_groups[0]["lr"] == 0.5


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
        (lambda: Cosine(-0.1, 9), "lr must be finite and at least 0, got -0.1"),
        (lambda: Cosine(0.1, 0), "total_steps must be at least 1, got 0"),
        (lambda: Cosine(0.1, 9, math.inf), "final_lr must be finite"),
        (lambda: Cosine(0.1, 9, momentum=1.5), r"momentum must lie in \[0, 1\), got 1.5"),
        (lambda: Cosine(0.1, 9)(-1), "step must be at least 0, got -1"),
        (lambda: Cyclic(-0.1, 0.2), "base_lr must be finite and at least 0"),
        (lambda: Cyclic(0.1, math.inf), "max_lr must be finite"),
        (lambda: Cyclic(0.3, 0.2), r"base_lr must be at most max_lr, got \(0.3, 0.2\)"),
        (lambda: Cyclic(0.1, 0.2, 0), "step_size_up must be at least 1, got 0"),
        (lambda: Cyclic(0.1, 0.2, 5, 0), "step_size_down must be at least 1, or None, got 0"),
        (lambda: Cyclic(0.1, 0.2, mode="saw"), "mode must be one of triangular, .* got 'saw'"),
        (lambda: Cyclic(0.1, 0.2, gamma=1.1), r"gamma must lie in \(0, 1\], got 1.1"),
        (lambda: Cyclic(0.1, 0.2, base_momentum=0.8), "must both be numbers or both be None"),
        (lambda: Cyclic(0.1, 0.2)(-1), "step must be at least 0, got -1"),
        (lambda: Warmup(Constant(0.1), -1), "steps must be at least 0"),
        (lambda: scale_lr(0.1, 0), "batch_size must be at least 1, got 0"),
        (lambda: scale_lr(0.1, 1, 0), "base_batch_size must be at least 1"),
        (lambda: scale_lr(0.1, 1, rule="cubic"), "rule must be 'linear' or 'sqrt', got 'cubic'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
