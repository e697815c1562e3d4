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
from fastmp.backends.abi import Reduction
from fastmp.bench import third_party
from fastmp.bench.clocks import CLOCKS, Run, kernel_clock
from fastmp.bench.harness import OURS, Case, Row, Timing, dtype_name, timed
from fastmp.bench.third_party import SMOOTHING

LAM = 0.3
SECONDS = {"cpu": 12.0, "cuda": 1.5}
#: Of a plain copy's rate, to be reached on a GPU, by rows and classes.
COPY_FRACTIONS = {
    (131072, 1000): 0.75,
    (65536, 4096): 0.80,
    (16384, 8192): 0.80,
    (8192, 32000): 0.84,
    (8192, 50257): 0.80,
    (4096, 128256): 0.77,
}
LIMITS = {(1024, 1000): 0.009, (131072, 10): 0.020}  # milliseconds on a GPU, at most
PRODUCTS = "three products alone"
SMALL = "fastmp, chunk=512"
LAST = 64  # rows, of those checked in fp64
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_pair(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two index losses, mixed: the fastest form in eager PyTorch."""
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
    """fastmp's; in fp16 with the loss scale as grad_scale, as the trainer passes it; here 1."""
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
    _, torch_grad = runs["eager pair"]()
    rows = logits[last].double().requires_grad_()
    fraction = len(rows) / len(logits)
    (reference,) = torch.autograd.grad(eager_pair(rows, a[last], b[last]) * fraction, rows)
    error, torch_error = (float((g[last] - reference).abs().max()) for g in (grad, torch_grad))
    assert error <= 2 * torch_error + 1e-9, (error, torch_error)
    # torch rounds the loss of 16-bit logits to 16 bits, so it gets these in fp32
    exact = eager_pair(logits.float(), a, b)
    assert (value - exact).abs() <= 1e-5 * exact.abs(), (value, exact)


def case(rows: int, classes: int, dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    """One size, against eager and compiled torch, and the other libraries installed."""
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
    libraries = third_party.losses(device)
    others: dict[str, Run] = {}
    for name, library in libraries.items():
        own = logits.detach().clone().requires_grad_()  # Liger overwrites them
        others[name] = partial(both_ways, partial(library.call, lam=LAM), own, a, b)
    others = third_party.working(others)
    label = f"loss, {dtype_name(dtype)}, {rows} x {classes}"
    timings = timed({**runs, **others}, seconds, label, kernel_clock(device))
    goals: dict[str, float] = {}
    if logits.numel() >= 2**21:  # smaller ones are for the picture alone
        goals = _goals(timings, device)
    return [
        Row(
            "loss", label, timings, 2 * logits.element_size() * logits.numel(), goals,
            copy_fraction=COPY_FRACTIONS.get((rows, classes), 0.0) if device == "cuda" else 0.0,
            limit=LIMITS.get((rows, classes), 0.0) if device == "cuda" else 0.0,
            clock=CLOCKS[device],
            not_comparable=[name for name in others if not libraries[name].comparable],
            series=f"loss, {dtype_name(dtype)}, {classes} classes",
        )
    ]  # fmt: skip


def _goals(timings: dict[str, Timing], device: str) -> dict[str, float]:
    eager, compiled = (
        min(names, key=lambda name: timings[name].median)
        for names in (("eager pair", "dense targets"), ("compiled pair", "compiled dense"))
    )
    if device == "cpu":
        return {eager: 4.0, compiled: 1.5}
    return {compiled: 1.5, **{name: 1.7 for name in timings if "Liger" in name}}


# ---- the linear layer before it ----


def linear_case(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float
) -> list[Row]:
    """(rows, features, classes): layer and loss both ways, against torch's with and without logits.

    And against its three products alone, of the same operands. On a GPU also in chunks of 512
    rows, which computes the logits twice; the notes have the peak of memory above the inputs.
    """
    rows, features, classes = shape
    torch.manual_seed(0)
    x = torch.randn(rows, features, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(classes, features, device=device) / features**0.5).to(dtype).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)
    candidates: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: fastmp.functional.linear_cross_entropy(x, w, y),
        "F.linear, F.cross_entropy": lambda: F.cross_entropy(F.linear(x, w), y),
    }
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        candidates["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            x, w, y, options=options
        )

    def both(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        value = loss()
        return value.detach().float(), *torch.autograd.grad(value, (x, w))

    with torch.no_grad():
        spec = y, None, None, None, -100, Reduction.MEAN, 0.0
        _, dz = torch.ops.fastmp.linear_loss_all_rows(x, w, None, None, *spec)

    def products() -> tuple[Tensor, ...]:
        with torch.no_grad():
            F.linear(x, w)
            return dz @ w, dz.t() @ x

    runs: dict[str, Run] = {name: partial(both, loss) for name, loss in candidates.items()}
    ours, theirs = (both(candidates[name]) for name in (OURS, "F.linear, F.cross_entropy"))
    tolerance = 8 * torch.finfo(dtype).eps
    for own, other in zip(ours, theirs, strict=True):
        error = (own - other).float().norm() / other.float().norm()
        assert error <= tolerance, (error, tolerance)
    label = f"linear + loss, {dtype_name(dtype)}, {rows} x {features} x {classes}"
    runs[PRODUCTS] = products
    if device == "cuda":
        runs[SMALL] = partial(
            both, lambda: fastmp.functional.linear_cross_entropy(x, w, y, chunk=512)
        )
    timings = timed(runs, seconds, label, kernel_clock(device))
    notes = "" if device == "cpu" else _peaks(runs)
    goals = {"F.linear, F.cross_entropy": 1.0}
    if device == "cuda":  # at H = 2,048 the loss, at 80% of a copy, is 7% of the products
        goals[PRODUCTS] = 0.95 if features >= 4096 else 0.9
    if "F.linear_cross_entropy" in runs:
        goals["F.linear_cross_entropy"] = 1.2
    return [
        Row(
            "loss", label, timings, goals=goals, notes=notes, clock=CLOCKS[device],
            not_comparable=[PRODUCTS, SMALL],
        )
    ]  # fmt: skip


def _peaks(runs: Mapping[str, Callable[[], object]]) -> str:
    """The peak of memory of each candidate, above what is there before."""
    peaks = []
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peaks.append(f"{name} {(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB")
    return f"peak {', '.join(peaks)}"


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.3 if quick else SECONDS[device]
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if quick:
        sizes = [(256, 1000, fp32), (512, 1000, fp32)]
    elif device == "cuda":
        sizes = [(n, c, bf16) for n, c in COPY_FRACTIONS] + [(8192, 32000, fp16)]
        sizes += [(n, c, bf16) for n, c in (*LIMITS, (16384, 1000))]
    else:
        sizes = [(n, c, t) for n, c in ((4096, 1000), (512, 32000)) for t in (fp32, bf16, fp16)]
        sizes += [(256, 50257, fp32), (1024, 10, fp32)] + [(n, 1000, bf16) for n in (64, 512)]
    found = [
        Case(f"loss {n} x {c} {dtype_name(t)}", partial(case, n, c, t, device, seconds))
        for n, c, t in sizes
    ]
    if quick:
        layers, dtype = [(256, 16, 1000)], fp32
    elif device == "cpu":
        layers, dtype = [(2048, 512, 50257)], fp32
    else:
        layers = [(2048, 4096, 128256), (8192, 4096, 128256), (4096, 2048, 32000)]
        dtype = bf16
    return found + [
        Case(
            f"linear + loss {rows} x {classes}",
            partial(linear_case, (rows, features, classes), dtype, device, seconds),
        )
        for rows, features, classes in layers
    ]
