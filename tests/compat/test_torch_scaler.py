"""Our scaler against torch's over thousands of random steps: equal scales at every step."""

import random

import pytest
import torch

import fastmp

STEPS = 5000
# Overflows in one of eight steps, growth after five clean ones: the scale walks about its start.
OPTIONS = {"init_scale": 2.0**13, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 5}


def made(kind):
    """Our scaler and optimizer, or torch's, with one fp32 parameter."""
    p = torch.full((3,), 1.0).requires_grad_()
    if kind == "ours":
        return p, fastmp.optim.SGD([p], lr=1e-3), fastmp.amp.GradScaler("cpu", **OPTIONS)
    return p, torch.optim.SGD([p], lr=1e-3), torch.amp.GradScaler("cpu", **OPTIONS)


def walk(seed):
    """Per step: gradient (overflow in one of eight), unscale_ or not, misuse (one in ten)."""
    generator = random.Random(seed)
    for _ in range(STEPS):
        bad = generator.random() < 0.125
        value = generator.choice([float("inf"), float("-inf"), float("nan")]) if bad else 0.0
        grad = torch.tensor([generator.uniform(-1, 1) for _ in range(3)])
        grad[generator.randrange(3)] += value
        yield grad, generator.random() < 0.3, generator.choice([None] * 18 + ["twice", "late"])


def one(p, optimizer, scaler, grad, unscale, misuse):
    """A training step; its error messages, the scale, the growth counter, the parameter."""
    errors = []
    scaler.scale(torch.ones(()))  # a loss, whose gradient is
    p.grad = grad * scaler.get_scale()
    try:
        if unscale:
            scaler.unscale_(optimizer)
        if misuse == "twice":
            scaler.unscale_(optimizer)
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        if misuse == "late":
            scaler.step(optimizer)
    except RuntimeError as error:
        errors.append(str(error))
    scaler.update()
    return errors, scaler.get_scale(), scaler._get_growth_tracker(), p.detach().clone()


@pytest.mark.parametrize("seed", [0, 1])
def test_scales_counters_skips_and_errors_are_torchs(seed):
    """Every hundred steps each scaler loads the other's state."""
    ours, theirs = made("ours"), made("torch")
    skipped, errors = 0, 0
    for number, (grad, unscale, misuse) in enumerate(walk(seed)):
        before = ours[0].detach().clone()
        a, b = (one(*side, grad, unscale, misuse) for side in (ours, theirs))
        assert a[:3] == b[:3], number
        torch.testing.assert_close(a[3], b[3], rtol=1e-5, atol=1e-6)
        skipped += int(torch.equal(before, a[3]))
        errors += len(a[0])
        if number % 100 == 99:
            states = [ours[2].state_dict(), theirs[2].state_dict()]
            assert states[0] == states[1]
            ours[2].load_state_dict(states[1])
            theirs[2].load_state_dict(states[0])
    assert skipped > STEPS // 10
    assert errors > STEPS // 20
