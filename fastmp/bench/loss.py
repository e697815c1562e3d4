"""The loss: mixup pair and label smoothing, forward and backward.

Bytes a logit (csrc/cpu/loss.cpp): each logit is read once and its gradient written once. A row's
partner is the one opposite in the batch, as in timm, so that timm's own loss is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmp
from fastmp.bench import rivals
from fastmp.bench.harness import OURS, Case, Row, Run, dtype_name, kernel_clock, timed
from fastmp.bench.rivals import SMOOTHING

LAM = 0.3
SECONDS = {"cpu": 12.0, "cuda": 1.5}
LAST = 64  # rows, of those checked in fp64
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """fastmp's; fp16 has a loss scale, which is announced as a trainer does; here it is 1."""
    scale = 1.0 if logits.dtype == torch.float16 else None
    return fastmp.functional.cross_entropy(
        logits, a, label_smoothing=SMOOTHING, target_b=b, lam=LAM, grad_scale=scale
    )


def both_ways(loss: Loss, logits: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    value = loss(logits, a, b)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad


def check(runs: Mapping[str, Callable[[], tuple[Tensor, Tensor]]], *inputs: Tensor) -> None:
    """The loss, and the gradient of the last rows, against fp64 and torch's own error."""
    logits, a, b = inputs
    last = slice(-LAST, None)
    value, grad = runs[OURS]()
    _, torchs = runs["eager pair"]()
    rows = logits[last].double().requires_grad_()
    share = len(rows) / len(logits)
    (reference,) = torch.autograd.grad(eager_pair(rows, a[last], b[last]) * share, rows)
    error, theirs = (float((g[last] - reference).abs().max()) for g in (grad, torchs))
    assert error <= 2 * theirs + 1e-9, (error, theirs)
    # torch rounds the loss of 16-bit logits to 16 bits, so it gets these in fp32
    exact = eager_pair(logits.float(), a, b)
    assert (value - exact).abs() <= 1e-5 * exact.abs(), (value, exact)


def case(rows: int, classes: int, dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    """One size, against eager and compiled torch, and what else is installed."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    a = torch.randint(classes, (rows,), device=device)
    b = a.flip(0)
    candidates: dict[str, Loss] = {
        OURS: ours,
        "eager pair": eager_pair,
        "dense targets": dense_targets,
        "compiled pair": torch.compile(eager_pair),
        "compiled dense": torch.compile(dense_targets),
    }
    runs = {name: partial(both_ways, f, logits, a, b) for name, f in candidates.items()}
    check(runs, logits.detach(), a, b)
    others = rivals.losses(device)
    beside: dict[str, Run] = {}
    for name, rival in others.items():
        own = logits.detach().clone().requires_grad_()  # Liger overwrites them
        beside[name] = partial(both_ways, partial(rival.call, lam=LAM), own, a, b)
    beside = rivals.working(beside)
    label = f"loss, {dtype_name(dtype)}, {rows} x {classes}"
    timings = timed({**runs, **beside}, seconds, label, kernel_clock(device))
    eager, compiled = (
        min(names, key=lambda name: timings[name].median)
        for names in (("eager pair", "dense targets"), ("compiled pair", "compiled dense"))
    )
    goals: dict[str, float] = {}
    share = 0.0
    if logits.numel() < 2**21:  # small: for the picture alone
        pass
    elif device == "cpu":
        goals = {eager: 4.0, compiled: 1.5}
    else:
        goals = {"dense targets": 10.0, compiled: 1.5}
        goals |= {name: 1.7 for name in beside if "Liger" in name}
        share = 0.9 if classes >= 4096 else 0.6
    moved = 2 * logits.element_size() * logits.numel()
    aside = [name for name in beside if not others[name].same_work]
    series = f"loss, {dtype_name(dtype)}, {classes} classes"
    return [Row("loss", label, timings, moved, goals, share=share, aside=aside, series=series)]


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.3 if quick else SECONDS[device]
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if quick:
        sizes = [(256, 1000, fp32), (512, 1000, fp32)]
    elif device == "cuda":
        shapes = [(131072, 1000), (65536, 4096), (8192, 32000), (4096, 128256)]
        sizes = [(n, c, bf16) for n, c in shapes] + [(8192, 32000, fp16)]
        sizes += [(n, 1000, bf16) for n in (1024, 16384)]
    else:
        sizes = [(n, c, t) for n, c in ((4096, 1000), (512, 32000)) for t in (fp32, bf16, fp16)]
        sizes += [(n, 1000, bf16) for n in (64, 512)]
    return [
        Case(f"loss {n} x {c} {dtype_name(t)}", partial(case, n, c, t, device, seconds))
        for n, c, t in sizes
    ]
