"""The linear layer: fp16 forward and backward, bf16 with gelu, fp32.

Operations: 2 M N K a product, three products forward and backward, held against the multiply-adds
that the machine can do (peak.py). Every case checks its error against fp64 on the tensors it timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fastmp
from benchmarks.harness import OURS, Row, interleave, rounds_within
from benchmarks.peak import peak
from fastmp.ops.linear import activate

Layer = Callable[..., Tensor]
Shape = tuple[int, int, int]  # rows, in_features, out_features


def ours(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    return fastmp.functional.linear(x, w, b, activation)


def theirs(x: Tensor, w: Tensor, b: Tensor, activation: str) -> Tensor:
    return activate(F.linear(x, w, b), activation)


def tensors(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, w, b and the incoming gradient; outputs of unit size."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    x, w, b, grad = (
        torch.randn(size, generator=generator)
        for size in ((rows, depth), (columns, depth), (columns,), (rows, columns))
    )
    return tuple(t.to(dtype) for t in (x, w / depth**0.5, b, grad))


def both_ways(layer: Layer, values: tuple[Tensor, ...], activation: str) -> list[Tensor]:
    *inputs, grad = (t.detach() for t in values)
    for t in inputs:
        t.requires_grad_()
    y = layer(*inputs, activation)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def forward(layer: Layer, values: tuple[Tensor, ...], activation: str) -> list[Tensor]:
    with torch.no_grad():
        return [layer(*values[:3], activation)]


def check(found: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> str:
    """Assert the error budget; the errors of y in words."""
    errors = [
        [
            (t.double() - reference).abs().max().item()
            for t, reference in zip(ts, exact, strict=True)
        ]
        for ts in (found, torchs)
    ]
    for mine, other in zip(*errors, strict=True):
        assert mine <= 2 * other + 1e-6, (mine, other)
    return f"largest error of y {errors[0][0]:.1e}, of torch's {errors[1][0]:.1e}"


def case(
    shape: Shape,
    dtype: torch.dtype,
    activation: str,
    direction: Callable[[Layer, tuple[Tensor, ...], str], list[Tensor]],
    goals: dict[str, float],
    seconds: float,
) -> Row:
    """One shape: fastmp against torch in the same dtype, compiled too, and in fp32."""
    name = str(dtype).removeprefix("torch.")
    values, wide = tensors(shape, dtype), tensors(shape, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(theirs)
    runs = {
        OURS: lambda: direction(ours, values, activation),
        f"torch {name}": lambda: direction(theirs, values, activation),
        f"compiled {name}": lambda: direction(compiled, values, activation),
        "torch float32": lambda: direction(theirs, wide, activation),
    }
    if dtype == torch.float16:  # the same product, which takes longest by far
        runs.pop("compiled float16")
    products = 1 if direction is forward else 3
    label = f"{name} {'forward' if products == 1 else 'both ways'}"
    label += f"{'' if activation == 'none' else f', {activation}'}, {'x'.join(map(str, shape))}"
    timings = interleave(runs, rounds_within(runs, seconds), label)
    exact = direction(theirs, tuple(t.double() for t in values), activation)
    return Row(
        "linear",
        label,
        timings,
        bytes_moved=0,
        goals=goals,
        notes=check(runs[OURS](), runs[f"torch {name}"](), exact),
        operations=products * 2 * shape[0] * shape[1] * shape[2],
        peak=peak(dtype),
    )


def rows(quick: bool) -> list[Row]:
    """Every case of this subject; quick ones for a look, full ones for a result."""
    seconds = 2 if quick else 8
    rows_of = (256,) if quick else (256, 2048)
    widths = (1024,) if quick else (1024, 4096)
    shapes = [(m, k, n) for m in rows_of for k in widths for n in widths]
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    found = [
        case(s, fp16, "none", forward, {"torch float16": 4.0, "torch float32": 1.2}, seconds)
        for s in shapes
    ]
    # torch's backward in fp16 runs at 1 to 3 GFLOP/s: minutes a step for the largest shapes.
    found += [
        case(s, fp16, "none", both_ways, {"torch float16": 4.0}, seconds)
        for s in shapes
        if s[0] * s[1] * s[2] < 2e9
    ]
    found += [case(s, bf16, "gelu", both_ways, {"torch bfloat16": 1.15}, seconds) for s in shapes]
    found += [case(s, fp32, "gelu", both_ways, {"torch float32": 1.0}, seconds) for s in shapes]
    return found
