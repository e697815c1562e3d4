"""The candidates of a training step.

fastmp converts the model and keeps masters: overflow check (fp16), clip and update are one call.
PyTorch runs autocast, or fp32, with AdamW(fused=True). Both eager, compiled, and as CUDA graphs:
PyTorch's by ``mode="reduce-overhead"``, which records forward and backward, fastmp's with the
optimizer in it. All have the same weights, batches and learning rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmp
from fastmp.bench.harness import OURS, dtype_name
from fastmp.bench.workloads import Inputs, Workload

LR = 1e-4  # small: all candidates must still agree after some dozens of steps on one batch
MAX_NORM = 1.0
Wrap = Callable[[nn.Module], nn.Module]
Step = Callable[..., Tensor]  # of the inputs of a workload; returns the loss
MODES = ("eager", "compiled", "graphed")


@dataclass(frozen=True)
class Learner:
    """One candidate, ready to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    predict: Callable[[Tensor], Tensor]  # normalised images -> logits


def ours(
    workload: Workload,
    model: nn.Module,
    device: str,
    dtype: torch.dtype,
    *,
    mode: str = "eager",
    wrap: Wrap = lambda m: m,
) -> Learner:
    """fastmp: 16-bit weights; unscale, overflow check and clip are in the optimizer."""
    model = fastmp.convert(copy.deepcopy(model), dtype)
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=MAX_NORM)
    scaler = fastmp.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = wrap(model)

    def loss_of(*inputs: Tensor) -> Tensor:
        return workload.loss(called, dtype, *inputs)

    step = _step(optimizer, scaler, torch.compile(loss_of) if mode == "compiled" else loss_of)
    if mode == "graphed":
        step = _graphed(step)
    return Learner(model, optimizer, step, lambda images: model(images.to(dtype)))


def torch_amp(
    workload: Workload,
    model: nn.Module,
    device: str,
    dtype: torch.dtype,
    *,
    mode: str = "eager",
    wrap: Wrap = lambda m: m,
) -> Learner:
    """PyTorch: autocast to ``dtype``, or fp32; unscale and clip as in its documentation."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = wrap(model)

    def autocast() -> Any:
        return torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

    def loss_of(*inputs: Tensor) -> Tensor:
        return workload.amp_loss(called, autocast, *inputs)

    def clip() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    def predict(images: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = model(images)
            return logits

    if mode != "eager":
        torch_mode = "reduce-overhead" if mode == "graphed" else "default"
        loss_of = torch.compile(loss_of, mode=torch_mode)
    return Learner(model, optimizer, _step(optimizer, scaler, loss_of, clip), predict)


def _step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_of: Step,
    clip: Callable[[], None] = lambda: None,
) -> Step:
    def step(*inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*inputs)
        scaler.scale(loss).backward()
        clip()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def _graphed(step: Step) -> Step:
    replayed = fastmp.graphed(step)

    def call(*inputs: Tensor) -> Tensor:
        loss: Tensor = replayed(*inputs)
        if replayed.reason:  # the kernels one by one would be timed under the name of a graph
            raise RuntimeError(f"no CUDA graph: {replayed.reason}")
        return loss

    return call


def candidates(
    workload: Workload, device: str, dtype: torch.dtype, modes: Sequence[str]
) -> dict[str, Learner]:
    """Every candidate in these modes of ``MODES``, eager among them, from the same weights.

    ``OURS`` is the mode that the workload names, the others of fastmp are ``own_modes``. On a CPU
    there are no graphs, and fastmp gains nothing by compiling, which takes minutes.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = workload.make().to(device)
    amp = f"AMP {dtype_name(dtype)}"
    own = own_modes(workload, device, modes)
    made = {name: ours(workload, model, device, dtype, mode=mode) for name, mode in own.items()}
    made[amp] = torch_amp(workload, model, device, dtype)
    made["fp32"] = torch_amp(workload, model, device, torch.float32)
    if "compiled" in modes:
        made[f"compiled {amp}"] = torch_amp(workload, model, device, dtype, mode="compiled")
    if "graphed" in modes and device == "cuda":
        made[f"reduce-overhead {amp}"] = torch_amp(workload, model, device, dtype, mode="graphed")
    return made


def own_modes(workload: Workload, device: str, modes: Sequence[str]) -> dict[str, str]:
    """fastmp's candidates by name, with their modes; ``OURS`` first."""
    headline = workload.own_mode if device == "cuda" and workload.own_mode in modes else "eager"
    rest = [mode for mode in modes if device == "cuda" and mode != headline]
    return {OURS: headline, **{f"{OURS}, {mode}": mode for mode in rest}}


def losses(learners: dict[str, Learner], inputs: Inputs) -> dict[str, float]:
    """One step of each."""
    return {name: float(learner.step(*inputs)) for name, learner in learners.items()}


def check(found: dict[str, float], first: float) -> None:
    """Assert that the losses agree within 2% of the first."""
    assert all(abs(loss - found[OURS]) < 0.02 * first for loss in found.values()), found
