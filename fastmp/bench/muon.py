"""Muon's step: alone, and with everything that a loss scaler does around it.

The baseline is ``torch.optim.Muon`` for matrices and kernels, flattened to (out, rest), and
``torch.optim.AdamW(fused=True)`` for the rest; both sides run five steps of the iteration in bf16.
Operations of an n x r n matrix, in units of 2 n³: torch's 5 (2 r + 1), ours 4 r + 14 from r = 2 on,
half of the symmetric ones left out (``fastmp/ops/orthogonalize.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import fastmp
from fastmp.bench import networks
from fastmp.bench.clocks import CLOCKS, Run, kernel_clock
from fastmp.bench.harness import OURS, Case, Row, timed
from fastmp.bench.optimizer import MAX_NORM, SCALE, SECONDS, TorchPipeline
from fastmp.models import VisionTransformer

LR = 0.02
TORCH = "torch.optim.Muon + AdamW(fused)"
Named = Sequence[tuple[str, tuple[int, ...], bool]]  # name, shape, whether Muon takes it


def _of(model: nn.Module) -> Named:
    groups = fastmp.optim.muon_groups(model)
    taken = {n for group in groups if group["rule"] == "muon" for n, _ in group["params"]}
    return [(name, tuple(p.shape), name in taken) for name, p in model.named_parameters()]


def vit(width: int, heads: int) -> Named:
    """A ViT of depth 12 for ImageNet: 192 is ViT-Ti, 384 ViT-S, 768 ViT-B."""
    with torch.device("meta"):
        return _of(
            VisionTransformer(
                (3, 224, 224), 1000, patch=16, width=width, depth=12, heads=heads, expansion=4
            )
        )


def resnet18() -> Named:
    """11.7 M parameters."""
    with torch.device("meta"):
        return _of(networks.resnet18((3, 224, 224), 1000))


def gpt2_10m(width: int = 384, depth: int = 6, vocabulary: int = 1024) -> Named:
    """GPT-2's tensors (Radford et al. 2019), 11 M parameters; weights are (in, out)."""
    found: list[tuple[str, tuple[int, ...], bool]] = [
        ("wte", (vocabulary, width), False),
        ("wpe", (256, width), False),
    ]
    for layer in range(depth):
        for name, rows, columns in (
            ("attn", width, 3 * width),
            ("attn.proj", width, width),
            ("mlp.fc", width, 4 * width),
            ("mlp.proj", 4 * width, width),
        ):
            found.append((f"{layer}.{name}", (rows, columns), True))
            found.append((f"{layer}.{name}.bias", (columns,), False))
        found += [(f"{layer}.norm{i}", (width,), False) for i in range(4)]
    return found


def parameters(named: Named, dtype: torch.dtype, device: str, *, flat: bool) -> list[Tensor]:
    """Random weights and gradients, the same at every call; ``flat``: kernels as matrices."""
    generator = torch.Generator(device).manual_seed(1)
    params = []
    for _, shape, taken in named:
        values = torch.randn((2, *shape), generator=generator, device=device)
        if flat and taken:
            values = values.flatten(2)
        params.append((values[0] * 0.05).to(dtype).requires_grad_())
        params[-1].grad = (values[1] * 1e-3).to(dtype)
    return params


def _split(named: Named, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(zip(named, params, strict=True))
    return [p for n, p in pairs if n[2]], [p for n, p in pairs if not n[2]]


def ours(named: Named, params: list[Tensor], max_norm: float | None) -> fastmp.optim.Muon:
    """One optimizer for all."""
    matrices, rest = _split(named, params)
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": rest, "rule": "adamw", "lr": 1e-3},
    ]
    return fastmp.optim.Muon(groups, lr=LR, max_grad_norm=max_norm)


def torchs(named: Named, params: list[Tensor]) -> list[torch.optim.Optimizer]:
    """torch's two optimizers on fp32 parameters."""
    matrices, rest = _split(named, params)
    return [torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=1e-3, fused=True)]


def check(found: list[Tensor], expected: list[Tensor], start: list[Tensor]) -> None:
    """The updates agree within the rounding of two bf16 iterations, 10% of their norm."""
    for mine, theirs, first in zip(found, expected, start, strict=True):
        theirs, first = theirs.detach().view_as(mine), first.detach().float().view_as(mine)
        assert (mine - theirs).norm() <= 0.1 * (theirs - first).norm() + 1e-6


def step_alone(
    named: Named, label: str, device: str, seconds: float, goal: float, limit: float = 0.0
) -> list[Row]:
    """fp32 parameters, without clipping; ours checks for overflow."""
    mine = parameters(named, torch.float32, device, flat=False)
    theirs = parameters(named, torch.float32, device, flat=True)
    optimizer, pair = ours(named, mine, None), torchs(named, theirs)
    label = f"Muon, fp32, {label}"
    runs: dict[str, Run] = {OURS: optimizer.step, TORCH: lambda: [o.step() for o in pair]}
    timings = timed(runs, seconds, label, kernel_clock(device))
    start = parameters(named, torch.float32, device, flat=False)
    check([p.detach() for p in mine], theirs, start)
    goals = {"best": goal}
    return [Row("muon", label, timings, goals=goals, limit=limit, clock=CLOCKS[device])]


def whole_step(named: Named, label: str, device: str, seconds: float, goal: float) -> list[Row]:
    """fp16 weights: unscale, overflow check, clip, update, write-back."""
    weights = parameters(named, torch.float16, device, flat=False)
    optimizer = ours(named, weights, MAX_NORM)
    scaler = fastmp.amp.GradScaler(device, init_scale=SCALE)
    scaler.scale(torch.ones((), device=device))
    theirs = TorchPipeline(
        parameters(named, torch.float16, device, flat=True), partial(torchs, named)
    )

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    label = f"Muon, whole step, fp16, {label}"
    runs: dict[str, Run] = {OURS: step, f"GradScaler + {TORCH}": theirs.step}
    timings = timed(runs, seconds, label, kernel_clock(device))
    start = parameters(named, torch.float16, device, flat=False)
    expected, first = (list(chain(*_split(named, p))) for p in (theirs.masters, start))
    check(optimizer.masters(), expected, first)
    return [Row("muon", label, timings, goals={"best": goal}, clock=CLOCKS[device])]


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.3 if quick else SECONDS[device]
    if quick:
        named = gpt2_10m(32, 1, 64)
        alone = partial(step_alone, named, "small", device, seconds, 1.0)
        return [
            Case("Muon small", alone),
            Case("Muon small, fp16", partial(whole_step, named, "small", device, seconds, 1.0)),
        ]
    sizes: list[tuple[str, Callable[[], Named], float, float]]
    if device == "cuda":
        sizes = [
            ("ViT-S", partial(vit, 384, 6), 5.0, 0.0),
            ("ViT-B", partial(vit, 768, 12), 2.0, 3.0),
            ("ResNet-18", resnet18, 5.0, 0.0),
        ]
    else:
        sizes = [
            ("ViT-Ti", partial(vit, 192, 3), 1.3, 0.0),
            ("ResNet-18", resnet18, 1.3, 0.0),
            ("GPT-2 10 M", gpt2_10m, 1.3, 0.0),
        ]
    found = []
    for label, make, goal, most in sizes:
        alone = partial(step_alone, make(), label, device, seconds, goal, most)
        found.append(Case(f"Muon {label}", alone))
        whole_goal = goal if device == "cuda" else 1.5
        whole = partial(whole_step, make(), label, device, seconds, whole_goal)
        found.append(Case(f"Muon {label}, fp16", whole))
    return found
