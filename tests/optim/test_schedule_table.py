"""Hyperparameters from a table, by applied steps; Lion."""

import pickle

import pytest
import torch

import fastmp
from tests.optim.optim_cases import SHAPES, give_gradients, masters, parameters, same_bits, snapshot

LRS, MOMENTA, NORMS = [0.1, 0.2, 0.05, 0.3], [0.5, 0.9, 0.7, 0.8], [1.0, 1e6, 0.1, 2.0]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "Muon"])
def test_a_table_is_followed_by_applied_steps(name, dtype):
    """Against the same numbers written into the groups; the overflow in between shifts nothing."""
    make = getattr(fastmp.optim, name)
    extra = {"momentum": 0.3} if name == "SGD" else {}
    shapes = [(24, 120), (5, 3, 2, 2), (0, 4), (7,), (3, 5)] if name == "Muon" else SHAPES
    second = {"rule": "adamw"} if name == "Muon" else {}
    runs = []
    for follows in (True, False):
        params = parameters(dtype, shapes)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr_scale": 0.5, **second}]
        optimizer = make(groups, lr=1.0, **extra)
        if follows:
            optimizer.set_schedule(LRS, MOMENTA, NORMS)
        for step in range(7):
            give_gradients(params, seed=step)
            if step in (1, 4):
                params[0].grad[0] = torch.nan
            if not follows:
                k = min(int(optimizer.applied_steps), 3)
                optimizer.max_grad_norm = NORMS[k]
                for group, factor in zip(optimizer.param_groups, (1, 0.5), strict=True):
                    group["lr"] = LRS[k] * factor
                    if "momentum" in group:
                        group["momentum"] = MOMENTA[k]
                    else:
                        group["betas"] = (MOMENTA[k], group["betas"][1])
            optimizer.step()
        assert optimizer.skipped_steps == 2
        runs.append(snapshot(optimizer, params))
    assert same_bits(*runs)


def test_a_table_is_pickled_and_can_be_cleared():
    params = parameters()
    optimizer = fastmp.optim.SGD(params, lr=1.0)
    optimizer.set_schedule([0.25])
    restored = pickle.loads(pickle.dumps(optimizer))
    own = restored.param_groups[0]["params"]
    for o, p in ((optimizer, params), (restored, own)):
        give_gradients(p)
        o.step()
    assert same_bits([p.detach() for p in params], [p.detach() for p in own])
    before = params[0].detach().clone()
    optimizer.clear_schedule()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - params[0].grad)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([],), "lr: expected at least one step"),
        (([0.1, 0.2], [0.9]), "momentum: expected 2 steps as for lr, got 1"),
        (([0.1, -0.2],), "lr: expected finite numbers"),
        (([0.1], None, [float("nan")]), "max_grad_norm: expected finite numbers"),
        (([0.1], [0.9]), "a parameter group has none"),
    ],
)
def test_a_bad_table_is_refused(columns, message):
    optimizer = fastmp.optim.SGD(parameters(), lr=1.0)
    with pytest.raises(ValueError, match=message):
        optimizer.set_schedule(*columns)
    assert optimizer._schedule is None


def lion(p, g, m, lr, betas, decay):
    """Algorithm 2 of arXiv:2302.06675, in fp64, and where its sign hangs on a rounding."""
    direction = betas[0] * m + (1 - betas[0]) * g
    step = lr * (direction.sign() + decay * p)
    return p - step, betas[1] * m + (1 - betas[1]) * g, direction.abs() < 1e-6


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_is_that_of_the_paper(dtype, maximize):
    params = parameters(dtype)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = fastmp.optim.Lion(params, maximize=maximize, **options)
    exact = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in params]
    unsure = [torch.zeros_like(p, dtype=torch.bool) for p in params]
    for step in range(20):
        give_gradients(params, seed=step)
        for i, p in enumerate(params):
            g = p.grad.double() * (-1 if maximize else 1)
            *exact[i], near = lion(exact[i][0], g, exact[i][1], *options.values())
            unsure[i] |= near
        optimizer.step()
    assert sum(int(u.sum()) for u in unsure) < 10
    for master, (p, _), u in zip(masters(optimizer, params), exact, unsure, strict=True):
        torch.testing.assert_close(master.double()[~u], p[~u], rtol=1e-5, atol=1e-6)


def test_lion_refuses_what_it_cannot_use():
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            fastmp.optim.Lion(parameters(), **bad)
