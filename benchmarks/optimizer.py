"""The optimizer step: the update alone, and the whole of what AMP does around it.

Bytes a parameter (see csrc/cpu/update.cpp): fp32 weights 32, fp16 weights with fp32 masters 30,
bf16 weights with split masters 28.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastmp
from benchmarks.harness import OURS, Row, interleave
from fastmp.ops.update import join_master

LR = 1e-3
MAX_NORM = 1.0
SCALE = 2.0**10


def tensors(count: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def parameters(count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    params = [p.to(dtype).requires_grad_() for p in tensors(count, size, 1)]
    for p, grad in zip(params, tensors(count, size, 2), strict=True):
        p.grad = (grad * 1e-3).to(dtype)
    return params


def masters(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    found = []
    for p in params:
        state = optimizer.state[p]
        value = p.detach()
        if "remainder" in state:
            value = join_master(value, state["remainder"])
        found.append(state.get("master", value))
    return found


def check(results: dict[str, list[Tensor]]) -> None:
    """Every candidate took as many steps from the same start: their weights must agree."""
    for name, found in results.items():
        for ours, theirs in zip(results[OURS], found, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def update_alone(
    count: int,
    size: int,
    rounds: int,
    *,
    checked: bool,
    goal: float | None = None,
    compiled: bool = False,
) -> Row:
    """fp32 parameters, nothing but step(); checked: the gradients are looked at first."""
    kinds: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        OURS: lambda p: fastmp.optim.AdamW(p, lr=LR, skip_nonfinite=checked),
        "AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
        "AdamW(foreach=True)": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    }
    models = {name: parameters(count, size, torch.float32) for name in kinds}
    steps: dict[str, Callable[[], object]] = {
        name: kinds[name](params).step for name, params in models.items()
    }
    if compiled:
        models["torch.compile"] = parameters(count, size, torch.float32)
        lr = torch.tensor(LR)  # a tensor: a number would be compiled in
        steps["torch.compile"] = torch.compile(torch.optim.AdamW(models["torch.compile"], lr).step)
    label = f"update alone, fp32, {count} x {size:,}" + (", overflow check" if checked else "")
    timings = interleave(steps, rounds, label)
    check({name: [p.detach() for p in params] for name, params in models.items()})
    return Row(
        "optimizer",
        label,
        timings,
        (32 if checked else 28) * count * size,
        {} if goal is None else {"best": goal},
        notes="torch's optimizers do not check" if checked else "",
    )


class TorchPipeline:
    """What PyTorch does for 16-bit weights with fp32 masters, each part in its fastest form."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        device = weights[0].device
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        self.grads = [torch.empty_like(p) for p in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
        self.scaler.scale(torch.ones((), device=device))

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.grads, [p.grad for p in self.weights])
        for p, grad in zip(self.masters, self.grads, strict=True):
            p.grad = grad
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch._foreach_copy_(self.weights, self.masters)


class FastmpPipeline:
    """The same work."""

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        device = weights[0].device
        self.optimizer = fastmp.optim.AdamW(self.weights, lr=LR, max_grad_norm=MAX_NORM)
        self.scaler = fastmp.amp.GradScaler(device.type, init_scale=SCALE)
        self.scaler.scale(torch.ones((), device=device))

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def whole_step(
    count: int, size: int, dtype: torch.dtype, rounds: int, *, goal: float | None = None
) -> Row:
    """Unscale, overflow check, clip, AdamW, 16-bit weights."""
    ours = FastmpPipeline(parameters(count, size, dtype))
    theirs = TorchPipeline(parameters(count, size, dtype))
    name = str(dtype).removeprefix("torch.")
    label = f"whole step, {name}, {count} x {size:,}"
    timings = interleave({OURS: ours.step, "GradScaler + fused": theirs.step}, rounds, label)
    check(
        {
            OURS: masters(ours.optimizer, ours.weights),
            "GradScaler + fused": [p.detach() for p in theirs.masters],
        }
    )
    bytes_a_parameter = 28 if dtype == torch.bfloat16 else 30
    goals = {} if goal is None else {"best": goal}
    return Row("optimizer", label, timings, bytes_a_parameter * count * size, goals)


def rows(quick: bool) -> list[Row]:
    """Every case of this subject; quick ones for a look, full ones for a result."""
    rounds = 5 if quick else 25
    size = 50_000 if quick else 500_000
    return [  # torch.compile last: what it loads slows every later call from Python
        whole_step(50, size, torch.float16, rounds, goal=2.0),
        whole_step(50, size, torch.bfloat16, rounds),
        # none for these: it unrolls the list and compiles for minutes
        update_alone(1000, 1024, 4 * rounds, goal=3.0, checked=False),
        update_alone(1000, 1024, 4 * rounds, goal=3.0, checked=True),
        update_alone(50, size, rounds, goal=0.95, checked=True),
        update_alone(50, size, rounds, goal=0.95, checked=False, compiled=not quick),
    ]
