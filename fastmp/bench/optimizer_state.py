"""What an optimizer keeps: moments in bf16 and 8 bits, the average of the weights in the pass.

Bytes a parameter with fp32 weights, without the scan: fp32 moments 28, bf16 20, 8 bits 16.1; the
average adds 8, in a pass of its own 12 with fp32 weights and 18 with 16-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastmp
from fastmp.bench import third_party
from fastmp.bench.clocks import CLOCKS, Run, kernel_clock
from fastmp.bench.harness import OURS, Row, dtype_name, timed
from fastmp.bench.rounding import LR, check

DECAY = 0.999
Parameters = Callable[[torch.dtype], list[Tensor]]


def averaged_step(make: Parameters, label: str, device: str, seconds: float) -> list[Row]:
    """The step with its average, against the step and then torch's ``AveragedModel``."""
    ours, alone, theirs = (make(torch.float32) for _ in range(3))
    optimizer = fastmp.optim.AdamW(ours, lr=LR, ema=DECAY)
    plain = fastmp.optim.AdamW(alone, lr=LR)
    model = nn.ParameterList(theirs)
    for p, given in zip(model, theirs, strict=True):
        p.grad = given.grad
    before = fastmp.optim.AdamW(model.parameters(), lr=LR)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def step_then_average() -> None:
        before.step()
        average.update_parameters(model)

    runs: dict[str, Run] = {
        OURS: optimizer.step,
        "step, then AveragedModel": step_then_average,
        "step alone": plain.step,
    }
    label = f"step with average, fp32, {label}"
    timings = timed(runs, seconds, label, kernel_clock(device))
    expected = [p.detach() for p in average.module.parameters()]
    found = {OURS: optimizer.averages(), "AveragedModel": expected}
    check(found, int(optimizer.applied_steps), roundings=5)
    # On a GPU the bytes allow (28 + 12) / 36 = 1.11: torch's foreach lerp moves 12.
    goals = {"step, then AveragedModel": 1.1 if device == "cuda" else 1.25, "step alone": 1 / 1.30}
    moved = 40 * sum(p.numel() for p in ours)
    row = Row(
        "optimizer", label, timings, moved, goals,
        not_comparable=["step alone"], clock=CLOCKS[device],
    )  # fmt: skip
    return [row]


def narrow_moments(
    make: Parameters, dtype: torch.dtype, label: str, device: str, seconds: float
) -> list[Row]:
    """Steps with moments in bf16 and 8 bits against those with fp32 ones, and other libraries."""
    wide, bf16, bits = make(dtype), make(dtype), make(dtype)
    steps: dict[str, Run] = {
        "fp32 moments": fastmp.optim.AdamW(wide, lr=LR).step,
        "bf16 moments": fastmp.optim.AdamW(bf16, lr=LR, state_dtype=torch.bfloat16).step,
        "8-bit moments": fastmp.optim.AdamW(bits, lr=LR, state_dtype="8bit").step,
    }
    libraries = third_party.optimizers(device, LR)
    others = third_party.working(
        {n: library.call(make(dtype)).step for n, library in libraries.items()}
    )
    label = f"{dtype_name(dtype)}, {label}"
    timings = timed(steps | others, seconds, f"moments, {label}", kernel_clock(device))
    for start, p, q, exact in zip(make(dtype), bf16, bits, wide, strict=True):
        way = (exact.float() - start.float()).norm()
        for found in (p, q):  # the noise of the moments, averaged over the elements
            assert (found.float() - exact.float()).norm() < 0.2 * way, "other weights"
    count = sum(p.numel() for p in wide)
    weights = {torch.float32: 12, torch.float16: 14, torch.bfloat16: 10}[dtype]  # and gradients
    gpu = device == "cuda"
    aims = {
        "bf16 moments": (8, {"fp32 moments": 1.3 if gpu else 1.15}),
        "8-bit moments": (4.125, {"fp32 moments": 1.6 if gpu else 1.0}),
    }
    if gpu:
        eight = ("FlashOptim, 8 bits", "bitsandbytes, 8 bits")
        aims["8-bit moments"][1].update({n: 1.5 for n in eight if n in others})
    rows = []
    for name, (moments, goals) in aims.items():
        rivals = {k: t for k, t in timings.items() if k not in aims}
        scan = 4 if dtype == torch.float32 else 2
        rows.append(
            Row(
                "optimizer", f"{name}, {label}", {OURS: timings[name], **rivals},
                int((weights + scan + moments) * count), goals, clock=CLOCKS[device],
                not_comparable=list(others),
            )
        )  # fmt: skip
    return rows
