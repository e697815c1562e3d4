"""The loss: mixup pair and label smoothing, forward and backward.

Bytes a logit (see csrc/cpu/loss.cpp): each logit is read once and its gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmp
from benchmarks.harness import OURS, Row, interleave

SMOOTHING = 0.1
LAM = 0.3


def eager_pair(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two index losses, mixed: the fastest form that eager PyTorch has."""
    first = F.cross_entropy(logits, a, label_smoothing=SMOOTHING)
    return LAM * first + (1 - LAM) * F.cross_entropy(logits, b, label_smoothing=SMOOTHING)


def dense_targets(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One soft target per row, as mixup libraries build it."""
    on, off = 1 - SMOOTHING, SMOOTHING / logits.shape[1]
    soft = torch.full_like(logits, off)
    soft.scatter_add_(1, a[:, None], torch.full_like(soft[:, :1], LAM * on))
    soft.scatter_add_(1, b[:, None], torch.full_like(soft[:, :1], (1 - LAM) * on))
    return torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1).mean()


def ours(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return fastmp.functional.cross_entropy(
        logits, a, label_smoothing=SMOOTHING, target_b=b, lam=LAM
    )


def both_ways(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], logits: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    value = loss(logits, a, b)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad


def case(rows: int, classes: int, dtype: torch.dtype, rounds: int) -> Row:
    torch.manual_seed(0)
    logits = torch.randn(rows, classes).to(dtype).requires_grad_()
    a, b = torch.randint(classes, (2, rows))
    torch._dynamo.reset()
    candidates = {
        OURS: ours,
        "eager pair": eager_pair,
        "dense targets": dense_targets,
        "compiled pair": torch.compile(eager_pair),
        "compiled dense": torch.compile(dense_targets),
    }
    runs = {name: lambda f=f: both_ways(f, logits, a, b) for name, f in candidates.items()}
    name = str(dtype).removeprefix("torch.")
    label = f"loss, {name}, {rows} x {classes}"
    timings = interleave(runs, rounds, label)
    exact = logits.detach().double().requires_grad_()
    value, grad = both_ways(eager_pair, exact, a, b)
    torchs_value, torchs_grad = runs["eager pair"]()
    our_value, our_grad = runs[OURS]()
    assert (our_value - value).abs() <= 2 * (torchs_value - value).abs() + 1e-6
    assert (our_grad - grad).abs().max() <= 2 * (torchs_grad - grad).abs().max() + 1e-9
    eager = min(("eager pair", "dense targets"), key=lambda n: timings[n].median)
    compiled = min(("compiled pair", "compiled dense"), key=lambda n: timings[n].median)
    size = 2 * logits.element_size() * logits.numel()
    return Row("loss", label, timings, size, {eager: 4.0, compiled: 1.5})


def rows(quick: bool) -> list[Row]:
    """Every case of this subject; quick ones for a look, full ones for a result."""
    rounds = 5 if quick else 61
    shapes = [(256, 1000), (32, 32000)] if quick else [(4096, 1000), (512, 32000)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [case(n, c, dtype, rounds) for n, c in shapes for dtype in dtypes]
