"""The linear layer: fp16 both ways, bf16 and fp32 with gelu; on a GPU plain products too.

Operations: 2 M N K a product, three products forward and backward; on a CPU against the largest
rate of multiply-adds (peak.py). Every case checks its error against fp64 on the tensors it timed,
on a GPU on their last rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmp
from fastmp.bench.clocks import kernel_clock
from fastmp.bench.harness import OURS, Case, GoalResult, Row, announce_compiled, dtype_name, timed
from fastmp.bench.peak import peak
from fastmp.ops.linear import activate, activation_gradient

SECONDS = {"cpu": 4.0, "cuda": 1.5}
ALONE = (2048, 1024)  # of activations without a product
LAST = 64  # rows, of those checked on a GPU
TORCH, OWN_PRODUCT, MM = "F.linear + F.gelu", "our product", "torch.mm"
Layer = Callable[..., Tensor]
Function = Callable[..., Any]
Values = tuple[Tensor, ...]
Direction = Callable[[Layer, Values, str], list[Tensor]]
Shape = tuple[int, int, int]  # M, K, N: rows, in_features, out_features

GELU: list[Shape] = [(16384, 512, 2048), (16384, 1024, 4096), (8192, 8192, 8192)]
# First layers of the MLPs of ViT-S, -B, GPT-2 medium and one between, 16 K to 64 K rows.
FIRST: list[Shape] = [
    (65536, 384, 1536), (16384, 512, 2048), (25216, 768, 3072), (16384, 1024, 4096),
]  # fmt: skip
# Of the forward against the best of eager and max-autotune: activation, whether z is kept, goal.
FORWARD = [("gelu", True, 1.10), ("gelu", False, 1.18), ("relu", True, 1.2)]
# ViT-B with 128 images, ViT-L with 83; K of the first layer, N its hidden size.
MLP: list[Shape] = [(25216, 768, 3072), (16384, 1024, 4096)]
# Training batches of transformers and classifiers, square ones, few rows.
PLAIN: list[Shape] = [
    (8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (16384, 1024, 4096),
    (16384, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096), (4096, 4096, 32000),
    (65536, 512, 512), (1024, 1024, 1024), (256, 4096, 4096), (16, 4096, 4096),
]  # fmt: skip


def ours(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    """fastmp's."""
    return fastmp.functional.linear(x, w, b, activation)


def theirs(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    """torch's."""
    return activate(F.linear(x, w, b), activation)


LAYERS = {OURS: ours, TORCH: theirs}


def tensors(shape: Shape, dtype: torch.dtype, device: str) -> Values:
    """x, w, b and the gradient of y; outputs of unit size."""
    m, k, n = shape
    generator = torch.Generator(device).manual_seed(0)
    x, w, b, grad = (
        torch.randn(size, generator=generator, device=device)
        for size in ((m, k), (n, k), (n,), (m, n))
    )
    return tuple(t.to(dtype) for t in (x, w / k**0.5, b, grad))


def both_ways(layer: Layer, values: Values, activation: str) -> list[Tensor]:
    """The output and three gradients."""
    *inputs, grad = (t.detach() for t in values)
    for t in inputs:
        t.requires_grad_()
    y = layer(*inputs, activation)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def forward(layer: Layer, values: Values, activation: str) -> list[Tensor]:
    """The output."""
    with torch.no_grad():
        return [layer(*values[:3], activation)]


def check(results: list[Tensor], torch_results: list[Tensor], exact: list[Tensor]) -> str:
    """Assert the error budget; a note of the errors of y."""
    errors = [
        [
            (t.double() - reference).abs().max().item()
            for t, reference in zip(side, exact, strict=True)
        ]
        for side in (results, torch_results)
    ]
    for error, torch_error in zip(*errors, strict=True):
        assert error <= 2 * torch_error + 1e-6, (error, torch_error)
    return f"largest error of y {errors[0][0]:.1e}, of torch's {errors[1][0]:.1e}"


def check_last(y: Tensor, torch_y: Tensor, values: Values, activation: str) -> str:
    """The same for the last rows of y."""
    x, w, b = (t.detach().double() for t in values[:3])
    exact = theirs(x[-LAST:], w, b, activation)
    return check([y[-LAST:]], [torch_y[-LAST:]], [exact])


def label_of(kind: str, shape: Shape) -> str:
    """As in "plain product, 16 x 4096 -> 4096"."""
    return f"{kind}, {shape[0]} x {shape[1]} -> {shape[2]}"


# ---- on a CPU ----


def case(
    shape: Shape,
    dtype: torch.dtype,
    activation: str,
    direction: Direction,
    goals: dict[str, float],
    seconds: float,
) -> list[Row]:
    """One shape: fastmp against torch in the same dtype, compiled too, and in fp32."""
    name = dtype_name(dtype)
    values, wide = (tensors(shape, t, "cpu") for t in (dtype, torch.float32))
    torch._dynamo.reset()
    runs = {
        OURS: partial(direction, ours, values, activation),
        f"torch {name}": partial(direction, theirs, values, activation),
        "torch float32": partial(direction, theirs, wide, activation),
    }
    if dtype != torch.float16:  # compiled, the same product, by far the slowest
        compiled = torch.compile(theirs)
        runs[f"compiled {name}"] = partial(direction, compiled, values, activation)
    products = 1 if direction is forward else 3
    kind = f"{name} {'forward' if products == 1 else 'both ways'}"
    label = label_of(kind + ("" if activation == "none" else f", {activation}"), shape)
    timings = timed(dict(runs), seconds, label, kernel_clock("cpu"))
    exact = direction(theirs, tuple(t.double() for t in values), activation)
    notes = check(runs[OURS](), runs[f"torch {name}"](), exact)
    operations = products * 2 * math.prod(shape)
    return [
        Row("linear", label, timings, goals=goals, notes=notes, operations=operations,
            peak=peak(dtype))
    ]  # fmt: skip


def activation_case(dtype: torch.dtype, activation: str, size: float, seconds: float) -> list[Row]:
    """An activation and its gradient alone, without a product; inputs of this size."""
    from fastmp.backends.cpu import linear as kernels

    generator = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(*ALONE, generator=generator) for _ in range(2))
    z, grad = (z * size).to(dtype), grad.to(dtype)
    name = dtype_name(dtype)
    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]] = {
        "forward": (
            lambda: kernels.activate(z, activation, in_place=False),
            lambda: activate(z, activation),
            activate(z.double(), activation),
        ),
        "gradient": (
            lambda: kernels.activation_backward(grad, z, activation, False, False)[0],
            lambda: activation_gradient(grad, z, activation),
            activation_gradient(grad.double(), z.double(), activation),
        ),
    }
    rows = []
    for way, (mine, torchs, exact) in ways.items():
        label = f"{name} {activation} alone, {way}, inputs of size {size:g}"
        timings = timed({OURS: mine, f"torch {name}": torchs}, seconds, label, kernel_clock("cpu"))
        notes = check([mine()], [torchs()], [exact])
        goal = 1.1 if (name, activation, way, size) == ("bfloat16", "gelu", "forward", 1) else 0.95
        rows.append(Row("linear", label, timings, goals={f"torch {name}": goal}, notes=notes))
    return rows


def cpu_cases(quick: bool) -> list[Case]:
    """Few and many rows, narrow and wide; activations alone."""
    seconds = 0.5 if quick else SECONDS["cpu"]
    heights, widths = ((256,), (1024,)) if quick else ((256, 2048), (1024, 4096))
    shapes = [(m, k, n) for m in heights for k in widths for n in widths]
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    kinds: list[tuple[torch.dtype, str, Direction, dict[str, float]]] = [
        (fp16, "none", forward, {"torch float16": 4.0, "torch float32": 1.2}),
        (fp16, "none", both_ways, {"torch float16": 4.0}),
        (bf16, "gelu", both_ways, {"torch bfloat16": 1.15}),
        (fp32, "gelu", both_ways, {"torch float32": 1.0}),
    ]
    return [
        Case(
            f"{dtype} {direction.__name__} {s}",
            partial(case, s, dtype, act, direction, {} if quick else goals, seconds),
        )
        for dtype, act, direction, goals in kinds
        for s in shapes
        # torch's backward in fp16 runs at 1 to 3 GFLOP/s: minutes a step for the larger shapes
        if (dtype, direction) != (fp16, both_ways) or math.prod(s) < 5e8
    ] + [
        Case(
            f"{activation} alone {dtype} {size}",
            partial(activation_case, dtype, activation, size, seconds / 4),
        )
        for dtype in (() if quick else (bf16, fp16))
        for activation in ("gelu", "silu")
        for size in (1, 8, 32)
    ]


# ---- on a GPU, bf16 ----


def _row(kind: str, shape: Shape, runs: dict[str, Any], products: int, **about: Any) -> list[Row]:
    label = label_of(kind, shape)
    timings = timed(runs, SECONDS["cuda"], label, kernel_clock("cuda"))
    operations = products * 2 * math.prod(shape)
    return [Row("linear", label, timings, operations=operations, clock="device", **about)]


def autotuned(function: Function, call: Callable[[Function], object]) -> Function:
    """``function`` compiled with max-autotune, for what ``call`` does with it.

    Twice: beside other cases, which leaves the compiled choices on disk; then in the turn of this
    case, where nothing disturbs their timing.
    """
    from torch._functorch import config as autograd  # they import the compiler
    from torch._inductor import config as inductor

    for own_turn in (False, True):
        if own_turn:
            announce_compiled()
        torch._dynamo.reset()
        compiled = torch.compile(function, mode="max-autotune-no-cudagraphs")
        with (
            inductor.patch(fx_graph_cache=False, autotune_local_cache=False),
            autograd.patch(enable_autograd_cache=False),
        ):
            call(compiled)
    return compiled


def gelu_case(shape: Shape) -> list[Row]:
    """Forward and backward with bias and gelu."""
    values = tensors(shape, torch.bfloat16, "cuda")
    runs = {name: partial(both_ways, f, values, "gelu") for name, f in LAYERS.items()}
    for run in runs.values():
        run()
    compiled = autotuned(theirs, lambda f: both_ways(f, values, "gelu"))
    runs["max-autotune"] = partial(both_ways, compiled, values, "gelu")
    notes = check_last(runs[OURS]()[0], runs[TORCH]()[0], values, "gelu")
    goals = {"best": 1.12 if shape in FIRST else 0.99}
    return _row("bias + gelu, both ways, bf16", shape, runs, 3, goals=goals, notes=notes)


def mlp_case(shape: Shape) -> list[Row]:
    """Two layers with gelu between, both ways; act(z), which torch keeps, is computed again."""
    (m, k, n), dtype = shape, torch.bfloat16
    x, w1, b1, _ = tensors(shape, dtype, "cuda")
    _, w2, b2, grad = tensors((m, n, k), dtype, "cuda")
    values = (x, w1, b1, w2, b2, grad)

    def mlp(layer: Layer) -> Layer:
        return lambda x, w1, b1, w2, b2, act: layer(layer(x, w1, b1, act), w2, b2, "none")

    runs = {name: partial(both_ways, mlp(f), values, "gelu") for name, f in LAYERS.items()}
    for run in runs.values():
        run()
    compiled = autotuned(mlp(theirs), lambda f: both_ways(f, values, "gelu"))
    runs["max-autotune"] = partial(both_ways, compiled, values, "gelu")
    exact = mlp(theirs)(x[-LAST:].double(), *(t.double() for t in values[1:5]), "gelu")
    mine, torchs = ([runs[name]()[0][-LAST:]] for name in (OURS, TORCH))
    goals = {TORCH: 1.0, "max-autotune": 1.0}
    notes = f"{check(mine, torchs, [exact])}; peak {_peaks(runs)}"
    return _row("MLP with gelu, both ways, bf16", shape, runs, 6, goals=goals, notes=notes)


def _peaks(runs: Mapping[str, Callable[[], Any]]) -> str:
    """The memory that each candidate takes at most, operands included."""
    peaks = []
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(f"{name} {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
    return ", ".join(peaks)


def forward_case(shape: Shape) -> list[Row]:
    """The forward with gelu: the product that fastmp selects for this K against the other one."""
    from fastmp.backends.triton.kernels import linear as kernels
    from fastmp.backends.triton.linear import fused_is_faster

    values = tensors(shape, torch.bfloat16, "cuda")
    x, w, b, _ = values
    routes: dict[str, Callable[[], Tensor]] = {
        OWN_PRODUCT: lambda: kernels.linear(x, w, b, "gelu", True)[0],
        TORCH: lambda: theirs(x, w, b, "gelu"),
    }
    notes = check_last(routes[OWN_PRODUCT](), routes[TORCH](), values, "gelu")
    selected = OWN_PRODUCT if fused_is_faster(shape[1], "gelu") else TORCH
    runs = {OURS: routes.pop(selected), **routes}
    notes += f"; selected: {selected}"
    return _row(
        "forward with gelu, bf16", shape, runs, 1, goals=dict.fromkeys(routes, 1.0), notes=notes
    )


def activated_case(shape: Shape, activation: str, save: bool, goal: float) -> list[Row]:
    """The forward with an activation, z written (for smooth ones) or not."""
    values = tensors(shape, torch.bfloat16, "cuda")
    x, w, b, _ = values

    def torchs(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        z = F.linear(x, w, b)
        return activate(z, activation), z if save and activation != "relu" else None

    runs: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: torch.ops.fastmp.linear(x, w, b, activation, save)[0],
        "eager": lambda: torchs(x, w, b)[0],
    }
    with torch.no_grad():
        for run in runs.values():
            run()
        compiled = autotuned(torchs, lambda f: f(x, w, b))
        runs["max-autotune"] = lambda: compiled(x, w, b)[0]
        notes = check_last(runs[OURS](), runs["eager"](), values, activation)
        kind = f"forward, {activation}{', z kept' if save and activation != 'relu' else ''}, bf16"
        return _row(kind, shape, runs, 1, goals={"best": goal}, notes=notes)


def plain_case(shape: Shape) -> list[Row]:
    """The product alone, as selected; our kernel, another route of ours, is shown, not ranked."""
    from fastmp.backends.triton.kernels import linear as kernels

    values = tensors(shape, torch.bfloat16, "cuda")
    x, w, b, _ = values
    wt = w.t()
    runs: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: fastmp.functional.linear(x, w),
        MM: lambda: torch.mm(x, wt),
        OWN_PRODUCT: lambda: kernels.linear(x, w, None, "none", False)[0],
    }
    bare = (x, w, torch.zeros_like(b))
    notes = check_last(runs[OWN_PRODUCT](), runs[MM](), bare, "none")
    return _row(
        "plain product, bf16", shape, runs, 1, goals={MM: 0.99}, notes=notes,
        not_comparable=[OWN_PRODUCT],
    )  # fmt: skip


def plain_mean(rows: list[Row]) -> GoalResult | None:
    """Geometric mean of the plain products against torch.mm; None without any."""
    ratios = [row.ratios[MM] for row in rows if row.case.startswith("plain")]
    if not ratios:
        return None
    mean = statistics.geometric_mean(ratios)
    goal = f"plain products, geometric mean of {len(ratios)}: 0.98x {MM}, device time"
    return GoalResult(goal, f"{mean:.3f}x", mean >= 0.98)


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    if device == "cpu":
        return cpu_cases(quick)
    both = [*FIRST, GELU[-1]]
    kinds = ((forward_case, GELU), (plain_case, PLAIN), (gelu_case, both), (mlp_case, MLP))
    made = [
        Case(f"{make.__name__} {shape}", partial(make, shape))
        for make, shapes in kinds
        for shape in (shapes[:1] if quick else shapes)
    ]
    return made + [
        Case(f"activated_case {shape} {kind}", partial(activated_case, shape, *kind))
        for kind in FORWARD
        for shape in (FIRST[:1] if quick else FIRST)
    ]
