"""Muon against torch's and an fp64 reference; overflow, averages, state."""

import copy
import pickle

import pytest
import torch

import fastmp
from fastmp import optim
from tests.optim.optim_cases import give_gradients, masters, parameters, same_bits, snapshot

common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch ships it; it needs expecttest"
)

MATRICES = [(48, 32), (32, 48), (32, 48), (24, 120), (120, 24), (1, 5), (7, 1)]
KERNEL = (16, 4, 3, 3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [
    {},
    {"nesterov": False, "momentum": 0.8},
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-6},
]


def mixed(dtype=torch.float32):
    """Matrices, a kernel and vectors, as the groups of one optimizer."""
    params = parameters(dtype, [*MATRICES, KERNEL, (9,), (), (13, 5)])
    return params, [
        {"params": params[:8]},
        {"params": params[8:], "rule": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ]


def distance(found, expected):
    """Of the updates, relative to their size."""
    pairs = list(zip(found, expected, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


# ---- against torch and fp64 ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_20_steps_equal_torchs(options, dtype):
    """The momentum to fp32's rounding; the updates to bf16's, in which both iterate."""
    ours = parameters(dtype, MATRICES)
    theirs = [p.detach().float().clone().requires_grad_() for p in ours]
    start = [p.detach().clone() for p in theirs]
    a, b = optim.Muon(ours, lr=0.02, **options), torch.optim.Muon(theirs, lr=0.02, **options)
    for step in range(20):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    moved = [(m - s, p.detach() - s) for m, s, p in zip(a.masters(), start, theirs, strict=True)]
    assert distance(*zip(*moved, strict=True)) < 0.05
    for p, q in zip(ours, theirs, strict=True):
        buffer = a.state[p]["momentum_buffer"].float()
        torch.testing.assert_close(buffer, b.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_kernel_against_the_fp64_reference(dtype, scale):
    """With scale, clip, schedule and both rules in one step."""
    (ours, groups), (exact, exact_groups) = mixed(dtype), mixed(dtype)
    for group in exact_groups:
        group["params"] = [p.detach().double().requires_grad_() for p in group["params"]]
    exact = [p for group in exact_groups for p in group["params"]]
    start = [p.detach().clone() for p in exact]
    a, b = (optim.Muon(g, lr=0.02, max_grad_norm=0.5) for g in (groups, exact_groups))
    for optimizer in (a, b):
        optimizer.set_schedule([0.02, 0.04, 0.01], [0.9, 0.8, 0.95])
    for step in range(4):
        give_gradients(ours, exact, scale=0.1, seed=step)
        for optimizer in (a, b):
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
            del optimizer.grad_scale
    assert a._tables.table.fallback is a._second.fallback is None
    assert b._tables.table.fallback is not None
    torch.testing.assert_close(a.grad_norm.double(), b.grad_norm.double(), rtol=1e-6, atol=0)
    moved = [
        (m.double() - s, p.detach() - s)
        for m, s, p in zip(masters(a, ours), start, exact, strict=True)
    ]
    assert distance(*zip(*moved[:8], strict=True)) < 0.06
    assert distance(*zip(*moved[8:], strict=True)) < 1e-3  # AdamW


def test_the_adamw_group_is_adamw():
    (ours, groups), (theirs, other) = mixed(), mixed()
    a = optim.Muon(groups)
    b = optim.AdamW(other[1]["params"], lr=0.01, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    assert same_bits([p.detach() for p in ours[8:]], [p.detach() for p in theirs[8:]])


MUON = next((info for info in common.optim_db if info.name == "Muon"), None)


@pytest.mark.parametrize("given", MUON.optim_inputs_func("cpu"), ids=lambda given: given.desc)
def test_torchs_own_cases(given):
    """Every constructor call of torch's tests."""
    ours, theirs = parameters(shapes=[(20, 30), (30, 20)]), parameters(shapes=[(20, 30), (30, 20)])
    start = [p.detach().clone() for p in ours]
    a, b = optim.Muon(ours, **given.kwargs), torch.optim.Muon(theirs, **given.kwargs)
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    moved = [[p.detach() - s for p, s in zip(of, start, strict=True)] for of in (ours, theirs)]
    assert distance(*moved) < 0.02
    assert isinstance(a, torch.optim.Muon)


def test_a_kernel_is_the_matrix_out_by_rest_in_any_order_of_memory():
    flat = parameters(shapes=[(16, 36)])
    kernel = [flat[0].detach().view(KERNEL).clone().requires_grad_()]
    last = [kernel[0].detach().to(memory_format=torch.channels_last).requires_grad_()]
    turned = [flat[0].detach().t().contiguous().t().requires_grad_()]
    made = [optim.Muon(p, lr=0.1) for p in (flat, kernel, last, turned)]
    for step in range(3):
        torch.manual_seed(step)
        grad = torch.randn(16, 36)
        for (p,), optimizer in zip((flat, kernel, last, turned), made, strict=True):
            p.grad = grad.view(p.shape).clone()
            optimizer.step()
    assert torch.equal(flat[0].view(KERNEL), kernel[0])
    # other orders of the same sums
    assert (
        distance([last[0].detach().reshape(16, 36), turned[0].detach()], [flat[0].detach()] * 2)
        < 2e-3
    )


# ---- overflow, threads, changed weights ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_one_overflow_changes_nothing_in_any_group(dtype):
    params, groups = mixed(dtype)
    optimizer = optim.Muon(groups, max_grad_norm=1.0)
    give_gradients(params)
    params[3].grad[1, 2] = torch.nan
    optimizer.step()  # the first step too, whose directions are not set
    give_gradients(params)
    optimizer.step()
    before = snapshot(optimizer, params)
    for bad in (0, 4, 7, 10):
        give_gradients(params, seed=3)
        params[bad].grad.view(-1)[-1] = torch.inf
        optimizer.step()
        assert same_bits(before, snapshot(optimizer, params))
        assert optimizer.nonfinite_param() == bad
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (1, 5)
    give_gradients(params, seed=4)
    optimizer.step()
    assert not same_bits(before, snapshot(optimizer, params))


def test_a_norm_whose_square_exceeds_fp32_gives_no_update_as_torchs():
    """Finite gradients are no overflow: the record has the norm, other matrices are updated."""
    ours, theirs = parameters(shapes=[(16, 24), (24, 16)]), parameters(shapes=[(16, 24), (24, 16)])
    a, b = optim.Muon(ours, lr=0.5), torch.optim.Muon(theirs, lr=0.5)
    give_gradients(ours, theirs)
    ours[0].grad *= 1e21
    theirs[0].grad *= 1e21
    decayed = ours[0].detach() * (1 - 0.5 * 0.1)
    a.step()
    b.step()
    torch.testing.assert_close(ours[0].detach(), decayed)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert a.grad_norm == torch.inf
    assert a.applied_steps == 1


def test_results_do_not_depend_on_threads_or_on_the_run():
    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params, groups = mixed(torch.bfloat16)
        optimizer = optim.Muon(groups, max_grad_norm=0.1)
        for step in range(3):
            give_gradients(params, seed=step)
            optimizer.step()
        torch.set_num_threads(before)
        return snapshot(optimizer, params)

    first = run(2)
    assert same_bits(first, run(1))
    assert same_bits(first, run(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_set_from_outside_replaces_its_master(dtype):
    (p,) = parameters(dtype, [(8, 8)])
    optimizer = optim.Muon([p], lr=1e-3)
    for step in range(3):
        give_gradients([p], seed=step)
        optimizer.step()
    with torch.no_grad():
        p.fill_(3.0)
    assert torch.equal(optimizer.masters()[0], torch.full((8, 8), 3.0))
    optimizer.step()
    assert (optimizer.masters()[0] - 3.0).abs().max() < 0.1


def test_a_scaler_skips_and_unscales():
    params, groups = mixed(torch.float16)
    optimizer = optim.Muon(groups)
    scaler = fastmp.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for step in range(3):
        give_gradients(params, scale=8.0, seed=step)
        if step == 1:
            params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (2, 1)


def test_options_changed_between_steps_count():
    ours, theirs = parameters(shapes=MATRICES), parameters(shapes=MATRICES)
    a, b = optim.Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1)
    for step in range(4):
        if step == 2:
            for optimizer in (a, b):
                optimizer.param_groups[0].update(ns_steps=2, adjust_lr_fn="match_rms_adamw")
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_averages_move_with_the_second_pass(dtype):
    """By a schedule of decays, not in a skipped step."""
    params, groups = mixed(dtype)
    optimizer = optim.Muon(groups, lr=0.02, ema=[0.5, 0.8, 0.2])
    expected = [m.double() for m in optimizer.masters()]
    for step, decay in enumerate((0.0, 0.8, None, 0.2, 0.2)):  # the first step copies
        give_gradients(params, seed=step)
        if decay is None:
            params[0].grad[0, 0] = torch.inf
        optimizer.step()
        if decay is not None:
            pairs = zip(expected, optimizer.masters(), strict=True)
            expected = [decay * e + (1 - decay) * m.double() for e, m in pairs]
    found = [average.double() for average in optimizer.averages()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kept", [{"state_dtype": torch.bfloat16}, {"state_dtype": "8bit"}, {"master": "split"}], ids=str
)
def test_narrow_momenta_and_split_masters(dtype, kept):
    """As with fp32 ones to their rounding; a skipped step leaves every byte."""
    shapes = [(64, 80), (80, 64), (32, 9, 4, 4), (90, 70)]
    plain, narrow = parameters(dtype, shapes), parameters(dtype, shapes)
    start = [p.detach().float().clone() for p in plain]
    made = []
    for params, options in ((plain, {}), (narrow, kept)):
        groups = [{"params": params[:3]}, {"params": params[3:], "rule": "adamw"}]
        made.append(optim.Muon(groups, lr=0.02, **options))
    for step in range(4):
        give_gradients(plain, narrow, seed=step)
        for optimizer in made:
            optimizer.step()
    moved = [[m - s for m, s in zip(o.masters(), start, strict=True)] for o in made]
    assert distance(moved[1][:3], moved[0][:3]) < 0.06
    before = snapshot(made[1], narrow)
    narrow[0].grad[0, 0] = torch.nan
    made[1].step()
    assert same_bits(before, snapshot(made[1], narrow))


# ---- state ----


def test_state_to_torch_and_back():
    ours, theirs = parameters(shapes=MATRICES), parameters(shapes=MATRICES)
    a, b = optim.Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    for step in range(6):
        if step in (2, 4):  # each takes over what the other has
            state = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
            b.load_state_dict(state[0])
            a.load_state_dict(state[1])
        give_gradients(ours, theirs, seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.02)


def test_states_of_torchs_two_optimizers_and_back():
    (ours, groups), (theirs, _) = mixed(), mixed()
    groups = [groups[1], {"params": ours[:3]}, {"params": ours[3:7]}]  # no kernel: torch takes none
    a = optim.Muon(groups, lr=0.02)
    b = torch.optim.Muon([{"params": theirs[:3]}, {"params": theirs[3:7]}], lr=0.5)
    c = torch.optim.AdamW(theirs[8:], lr=0.5)
    ours.pop(7), theirs.pop(7)

    def step(seed):
        give_gradients(ours, theirs, seed=seed)
        for optimizer in (a, b, c):
            optimizer.step()

    give_gradients(ours)
    a.step()
    for p, q in zip(theirs, ours, strict=True):
        p.data.copy_(q.detach())
    for optimizer, state in zip((b, c), copy.deepcopy(a.torch_states()), strict=True):
        optimizer.load_state_dict(state)
    step(1)
    a.load_torch_states(*copy.deepcopy((b.state_dict(), c.state_dict())))
    step(2)
    torch.testing.assert_close(ours[7:], theirs[7:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[:7], theirs[:7], rtol=0.01, atol=0.01)
    with pytest.raises(
        ValueError, match="a group of 4 parameters in the state of torch's muon, got none"
    ):
        a.load_torch_states(c.state_dict(), c.state_dict())
    with pytest.raises(ValueError, match="torch's adamw has more groups"):
        optim.Muon(parameters(shapes=[(2, 2)])).load_torch_states(
            optim.Muon(parameters(shapes=[(2, 2)])).state_dict(), c.state_dict()
        )


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "8bit"])
def test_narrow_states_of_torchs_two_optimizers_are_fp32(state_dtype):
    params = parameters(torch.float16, [(80, 70), (90, 60)])
    groups = [{"params": params[:1]}, {"params": params[1:], "rule": "adamw"}]
    optimizer = optim.Muon(groups, lr=0.02, state_dtype=state_dtype, ema=0.5)
    give_gradients(params, scale=0.1)
    optimizer.step()
    muon, adamw = (states["state"][0] for states in optimizer.torch_states())
    assert muon.keys() == {"momentum_buffer", "step"}
    assert adamw.keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert {value.dtype for value in (*muon.values(), *adamw.values())} == {torch.float32}
    first = 0.05 * params[0].grad.float()  # the momentum; at most rounded to 8 bits
    assert (muon["momentum_buffer"] - first).norm() < 0.05 * first.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_resumes_to_the_bit(dtype):
    def steps(optimizer, params, seeds):
        for seed in seeds:
            give_gradients(params, seed=seed)
            optimizer.step()

    params, groups = mixed(dtype)
    whole = optim.Muon(groups, lr=0.02)
    steps(whole, params, range(3))
    saved = copy.deepcopy(whole.state_dict())
    others, groups = mixed(dtype)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.detach())
    resumed = optim.Muon(groups, lr=0.5)
    resumed.load_state_dict(saved)
    pickled = pickle.loads(pickle.dumps(whole))
    copied = [p for group in pickled.param_groups for p in group["params"]]
    for optimizer, own in ((whole, params), (resumed, others), (pickled, copied)):
        steps(optimizer, own, range(3, 6))
    assert same_bits(snapshot(whole, params), snapshot(resumed, others))
    assert same_bits(snapshot(whole, params), snapshot(pickled, copied))
