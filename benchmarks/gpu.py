"""The GPU kernels against PyTorch and Liger: the step, the loss, linear with gelu, plain products.

Every case asserts its error against fp64 on the tensors it timed, the largest ones on their last
rows. Liger has no mixed pair and overwrites its logits: it gets one target and logits of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmp
from benchmarks import gpu_optimizer
from benchmarks.harness import OURS, DeviceTime, Row, interleave, rounds_within
from benchmarks.loss import both_ways, dense_targets, eager_pair, ours
from fastmp.backends.triton import linear as kernels
from fastmp.ops.linear import activate, linear_cuda

LOSS = [(131072, 1000), (65536, 4096), (8192, 32000), (4096, 128256)]
GELU = [(16384, 512, 2048), (16384, 1024, 4096), (8192, 8192, 8192)]  # rows, in, out features
# Rows, depth, columns: training batches of transformers and classifiers, square ones, few rows.
PLAIN = [
    (8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (16384, 1024, 4096),
    (16384, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096), (4096, 4096, 32000),
    (65536, 512, 512), (1024, 1024, 1024), (256, 4096, 4096), (16, 4096, 4096),
]  # fmt: skip
SECONDS = 1.5  # for each case; most of the time goes to what torch.compile compiles


def timed(row: Callable[..., Row], runs: dict[str, Callable[[], object]], label: str) -> Row:
    rounds = rounds_within(runs, SECONDS)
    return row(interleave(runs, rounds, label, DeviceTime()))


def liger(logits: Tensor, a: Tensor, _b: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, a, label_smoothing=0.1)


def has_liger() -> bool:
    try:
        import liger_kernel.transformers.functional  # noqa: F401
    except ImportError:
        return False
    return True


def check_loss(runs: dict[str, Callable[[], tuple[Tensor, Tensor]]], exact: Tensor, a, b) -> None:
    """The gradient of the last rows, and the loss, against fp64 and torch's own error."""
    last = slice(-64, None)
    value, grad = runs[OURS]()
    _, torchs_grad = runs["eager pair"]()
    rows = exact[last].double().requires_grad_()
    share = len(rows) / len(exact)
    (reference,) = torch.autograd.grad(eager_pair(rows, a[last], b[last]) * share, rows)
    error, theirs = ((g[last] - reference).abs().max() for g in (grad, torchs_grad))
    assert error <= 2 * theirs + 1e-9, (error, theirs)
    # torch rounds the loss of 16-bit logits to 16 bits, so it gets these in fp32.
    assert (value - eager_pair(exact.float(), a, b)).abs() <= 1e-5 * value.abs()


def loss_case(rows: int, classes: int, dtype: torch.dtype) -> Row:
    torch.manual_seed(0)
    torch._dynamo.reset()
    logits = torch.randn(rows, classes, device="cuda", dtype=dtype).requires_grad_()
    a, b = torch.randint(classes, (2, rows), device="cuda")
    candidates = {
        OURS: ours if dtype != torch.float16 else announced,
        "eager pair": eager_pair,
        "timm-style eager": dense_targets,
        "compiled pair": torch.compile(eager_pair),
        "compiled dense": torch.compile(dense_targets),
    }
    runs = {name: lambda f=f: both_ways(f, logits, a, b) for name, f in candidates.items()}
    check_loss(runs, logits.detach(), a, b)
    if has_liger():
        own = logits.detach().clone().requires_grad_()
        runs["Liger"] = lambda: both_ways(liger, own, a, b)
    label = f"loss, {str(dtype).removeprefix('torch.')}, {rows} x {classes}"
    size = 2 * logits.element_size() * logits.numel()

    def row(timings):
        compiled = min(("compiled pair", "compiled dense"), key=lambda n: timings[n].median)
        goals = {"timm-style eager": 10.0, compiled: 1.5, **({"Liger": 1.7} if own_liger else {})}
        return Row("gpu", label, timings, size, goals, share=0.9 if classes >= 4096 else 0.6)

    own_liger = "Liger" in runs
    return timed(row, runs, label)


def announced(logits: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """fp16 has a loss scale, which a trainer announces; here it is 1."""
    return fastmp.functional.cross_entropy(
        logits, a, label_smoothing=0.1, target_b=b, lam=0.3, grad_scale=1.0
    )


def operands(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """x, w, b and the incoming gradient in bf16; outputs of unit size."""
    rows, depth, columns = shape
    torch.manual_seed(0)
    x, w, b, grad = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16)
        for size in ((rows, depth), (columns, depth), (columns,), (rows, columns))
    )
    return x, w / depth**0.5, b, grad


def check_rows(y: Tensor, theirs: Tensor, x: Tensor, w: Tensor, b: Tensor, act: str) -> None:
    last = slice(-64, None)
    reference = activate(F.linear(x[last].double(), w.double(), b.double()), act)
    error, torchs = ((t[last] - reference).abs().max() for t in (y, theirs))
    assert error <= 2 * torchs + 1e-6, (error, torchs)


def gelu_case(shape: tuple[int, int, int]) -> Row:
    x, w, b, grad = operands(shape)
    inputs = [t.requires_grad_() for t in (x, w, b)]
    torch._dynamo.reset()

    def eager(x, w, b):
        return F.gelu(F.linear(x, w, b))

    def both(layer):
        y = layer(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    layers = {
        OURS: lambda x, w, b: fastmp.functional.linear(x, w, b, "gelu"),
        "F.linear + F.gelu": eager,
        "max-autotune": torch.compile(eager, mode="max-autotune-no-cudagraphs"),
    }
    runs = {name: lambda f=f: both(f) for name, f in layers.items()}
    check_rows(
        runs[OURS]()[0], runs["F.linear + F.gelu"]()[0], *(t.detach() for t in inputs), "gelu"
    )
    rows, depth, columns = shape
    label = f"linear + bias + gelu, both ways, bf16, {rows} x {depth} -> {columns}"
    goals = {"F.linear + F.gelu": 1.25 if depth <= 1024 else 1.04, "max-autotune": 1.05}
    count = 6 * rows * depth * columns
    return timed(lambda t: Row("gpu", label, t, 0, goals, operations=count), runs, label)


def forward_case(shape: tuple[int, int, int]) -> Row:
    """Both routes of the forward with gelu, whichever the rule takes: what it should be set by."""
    x, w, b, _ = operands(shape)
    runs = {
        OURS: lambda: linear_cuda(x, w, b, "gelu", True)[0],
        "our product": lambda: kernels.linear(x, w, b, "gelu", True)[0],
        "vendor's product + pass": lambda: F.gelu(F.linear(x, w, b)),
    }
    check_rows(runs["our product"](), runs["vendor's product + pass"](), x, w, b, "gelu")
    rows, depth, columns = shape
    label = f"forward with gelu, bf16, {rows} x {depth} -> {columns}"
    count = 2 * rows * depth * columns
    return timed(lambda t: Row("gpu", label, t, 0, {"best": 1.0}, operations=count), runs, label)


def plain_case(shape: tuple[int, int, int]) -> Row:
    x, w, b, _ = operands(shape)
    wt = w.t()
    runs = {
        OURS: lambda: fastmp.functional.linear(x, w),
        "torch.mm": lambda: torch.mm(x, wt),
        "our product": lambda: kernels.linear(x, w, None, "none", False)[0],
    }
    check_rows(runs["our product"](), runs["torch.mm"](), x, w, torch.zeros_like(b), "none")
    rows, depth, columns = shape
    label = f"plain product, bf16, {rows} x {depth} -> {columns}"
    count = 2 * rows * depth * columns
    return timed(lambda t: Row("gpu", label, t, 0, {}, operations=count), runs, label)


def plain_mean(rows: list[Row]) -> tuple[str, float, float]:
    """The geometric mean over the plain products against torch.mm, and what was asked for."""
    ratios = [row.ratios["torch.mm"] for row in rows if row.case.startswith("plain")]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
    return f"plain product, geometric mean of {len(ratios)} shapes", mean, 0.98


def cases() -> list[tuple[str, Callable[[], Row]]]:
    """Every case by name; each allocates what it needs when it is called."""
    dtypes = [torch.bfloat16] * len(LOSS) + [torch.float16]
    losses = [
        (f"loss {n} x {c} {d}", lambda n=n, c=c, d=d: loss_case(n, c, d))
        for (n, c), d in zip([*LOSS, LOSS[2]], dtypes, strict=True)
    ]
    gelus = [(f"gelu {s}", lambda s=s: gelu_case(s)) for s in GELU]
    forwards = [(f"forward {s}", lambda s=s: forward_case(s)) for s in GELU]
    return (
        gpu_optimizer.cases()
        + losses
        + forwards
        + [(f"plain {s}", lambda s=s: plain_case(s)) for s in PLAIN]
        + gelus
    )
