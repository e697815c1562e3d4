"""A whole training step of the Fashion-MNIST mlp, 784-2048-2048-10, 256 images.

Forward, loss with smoothing, backward, AdamW step. fastmp converts the model, scales the loss in
fp16 and keeps fp32 masters; torch runs autocast, or fp32, with AdamW(fused=True).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmp
from benchmarks.harness import OURS, Row, interleave, rounds_within
from benchmarks.peak import peak
from fastmp import models

BATCH = 256
SMOOTHING = 0.1
LR = 1e-4


def our_step(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    model = fastmp.convert(copy.deepcopy(model), dtype)
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=LR)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    scaler = fastmp.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    x = x.to(dtype)

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def torch_step(model: nn.Module, x: Tensor, y: Tensor, *, autocast: bool) -> Callable[[], float]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = F.cross_entropy(model(x), y, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def case(dtype: torch.dtype, goals: dict[str, float], seconds: float) -> Row:
    torch.manual_seed(0)
    model = models.mlp((1, 28, 28), 10)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    runs = {
        OURS: our_step(model, x, y, dtype),
        "torch autocast bfloat16": torch_step(model, x, y, autocast=True),
        "torch float32": torch_step(model, x, y, autocast=False),
    }
    first = {name: step() for name, step in runs.items()}
    assert all(math.isclose(loss, first[OURS], rel_tol=1e-2) for loss in first.values()), first
    label = f"mlp step, {str(dtype).removeprefix('torch.')}"
    timings = interleave(runs, rounds_within(runs, seconds), label)
    # Every candidate took as many steps: they learnt the same.
    last = {name: step() for name, step in runs.items()}
    assert all(abs(loss - last[OURS]) < 0.02 * first[OURS] for loss in last.values()), last
    weights = [layer.weight.numel() for layer in model if isinstance(layer, nn.Linear)]
    products = 3 * sum(weights) - weights[0]  # the images need no gradient
    return Row(
        "training", label, timings, bytes_moved=0, goals=goals,
        notes=f"losses {first[OURS]:.4f} to {last[OURS]:.4f}, "
        + ", ".join(f"{name} {last[name]:.4f}" for name in runs if name != OURS),
        operations=2 * BATCH * products, peak=peak(dtype),
    )  # fmt: skip


def rows(quick: bool) -> list[Row]:
    """Every case of this subject; quick ones for a look, full ones for a result."""
    seconds = 2 if quick else 30
    auto = {"torch autocast bfloat16": 1.25, "torch float32": 4.0}
    return [
        case(torch.bfloat16, auto, seconds),
        case(torch.float16, {"torch float32": 1.2}, seconds),
    ]
