"""The optimizer step on a GPU: the launch alone, against torch's pipeline, and what the host pays.

Bytes a parameter as in csrc/cuda/update.cu. Every candidate takes as many steps from the same start
and must come to the same masters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastmp
from benchmarks.harness import OURS, DeviceTime, Row, interleave, rounds_within
from benchmarks.optimizer import LR, FastmpPipeline, TorchPipeline, check, masters

Shapes = list[tuple[int, ...]]
LARGE: Shapes = [(4096, 4096)] * 6 + [(1024, 1024)] * 4  # 105 M
BYTES = {torch.float32: 32, torch.float16: 30, torch.bfloat16: 28}
SECONDS = 1.0


def resnet50() -> Shapes:
    """ResNet-50's 161 tensors (He et al. 2015), 25.6 M parameters."""

    def layer(wide: int, deep: int, kernel: int) -> Shapes:
        return [(wide, deep, kernel, kernel), (wide,), (wide,)]

    shapes, deep = layer(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += layer(width, deep, 1) + layer(width, width, 3) + layer(4 * width, width, 1)
            shapes += layer(4 * width, deep, 1) if block == 0 else []
            deep = 4 * width
    return [*shapes, (1000, deep), (1000,)]


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    params = []
    for shape in shapes:
        values = torch.randn((2, *shape), generator=generator, device="cuda")
        params.append(values[0].to(dtype).requires_grad_())
        params[-1].grad = (values[1] * 1e-3).to(dtype)
    return params


def size_of(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def alone(shapes: Shapes, dtype: torch.dtype) -> Row:
    """The launch with clipping, of the bandwidth of a copy; torch's fused AdamW in fp32 beside."""
    weights = parameters(shapes, dtype)
    optimizer = fastmp.optim.AdamW(weights, lr=LR, max_grad_norm=1.0)
    exact = [p.detach().float().requires_grad_() for p in weights]
    for p, w in zip(exact, weights, strict=True):
        assert w.grad is not None
        p.grad = w.grad.float()
    theirs = torch.optim.AdamW(exact, lr=LR, fused=True)
    torch.nn.utils.clip_grad_norm_(exact, 1.0)
    runs: dict[str, Callable[[], object]] = {OURS: optimizer.step, "AdamW(fused=True)": theirs.step}
    label = f"step alone, {str(dtype).removeprefix('torch.')}, {size_of(shapes) / 1e6:.0f} M"
    timings = interleave(runs, rounds_within(runs, SECONDS), label, DeviceTime())
    check({OURS: masters(optimizer, weights), "torch": [p.detach() for p in exact]})
    moved = BYTES[dtype] * size_of(shapes)
    notes = "torch's does not look at the gradients and has no 16-bit weights"
    return Row("gpu", label, timings, moved, {}, share=0.92, notes=notes)


def whole(name: str, shapes: Shapes, dtype: torch.dtype, goal: float) -> Row:
    """unscale_, clip, AdamW(fused), update and the casts, against one launch and one for update."""
    ours, theirs = (made(parameters(shapes, dtype)) for made in (FastmpPipeline, TorchPipeline))
    runs = {OURS: ours.step, "GradScaler + fused": theirs.step}
    label = f"whole step, {str(dtype).removeprefix('torch.')}, {name}"
    timings = interleave(runs, rounds_within(runs, SECONDS), label, DeviceTime())
    found = [p.detach() for p in theirs.masters]
    check({OURS: masters(ours.optimizer, ours.weights), "GradScaler + fused": found})
    moved = BYTES[dtype] * size_of(shapes)
    return Row("gpu", label, timings, moved, {"best": goal})


def on_the_host(changed: bool) -> Row:
    """The time until step() returns, 500 tensors; the GPU is done with the step before."""
    shapes: Shapes = [(256,)] * 500

    def candidate(make: Callable[..., torch.optim.Optimizer], **options: object):
        params = parameters(shapes, torch.float32)
        optimizer = make(params, lr=LR, **options)
        two = [[p.grad, torch.randn_like(p)] for p in params]
        turn = 0

        def run() -> float:
            nonlocal turn
            turn += changed
            for p, grads in zip(params, two, strict=True):
                p.grad = grads[turn % 2]
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            return (time.perf_counter() - start) * 1e3

        return run

    runs = {
        OURS: candidate(fastmp.optim.AdamW),
        "AdamW(fused=True)": candidate(torch.optim.AdamW, fused=True),
    }
    which = "changed" if changed else "the same"
    label = f"host time of a step, 500 tensors, gradients {which}"
    return Row("gpu", label, interleave(runs, 61, label, lambda run: run()), 0, {"best": 1.0})


def cases() -> list[tuple[str, Callable[[], Row]]]:
    """Every case by name."""
    made: list[tuple[str, Callable[[], Row]]] = [
        (f"step alone {dtype}", lambda d=dtype: alone(LARGE, d)) for dtype in BYTES
    ]
    half = torch.float16
    for name, shapes, goal in (
        ("105 M", LARGE, 2.0),
        ("ResNet-50", resnet50(), 5.0),
        ("1000 x 1024", [(1024,)] * 1000, 5.0),
    ):
        made.append((f"whole step {name}", lambda n=name, s=shapes, g=goal: whole(n, s, half, g)))
    made += [(f"host, changed: {c}", lambda c=c: on_the_host(c)) for c in (True, False)]
    return made
