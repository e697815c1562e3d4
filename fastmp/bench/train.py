"""A whole training step, and the seconds to a given accuracy.

A step takes a batch of uint8 images: normalise, mixup, forward, loss of the mixed pair with
smoothing, backward, overflow check in fp16, clip, AdamW. fastmp converts the model and keeps
masters; torch runs autocast, eager and compiled, or fp32, with AdamW(fused=True). All have the same
weights, batches, λ and schedule.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmp
from fastmp import data, models
from fastmp.bench import harness, networks
from fastmp.bench.clocks import step_clock
from fastmp.bench.harness import OURS, Case, Curve, Row, Timing, dtype_name, timed
from fastmp.bench.third_party import SMOOTHING
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import OneCycle

OURS_COMPILED = f"{OURS}, compiled"
LR = 1e-4  # small: all candidates must still agree after some dozens of steps on one batch
LAM = 0.7
MAX_NORM = 1.0
SECONDS = {"cpu": 15.0, "cuda": 3.0}
MEAN, STD = 0.3, 0.35
CHUNK = 10  # steps between two measurements of the accuracy
TESTED = 2000  # images
Wrap = Callable[[nn.Module], nn.Module]
Step = Callable[[Tensor, Tensor, float], Tensor]  # (images, labels, λ) -> loss


@dataclass(frozen=True)
class Workload:
    """A model, and the number and shape of the images of a step."""

    name: str
    build: Callable[[models.Shape, int], nn.Module]
    shape: models.Shape
    classes: int
    batch: int


class Target(NamedTuple):
    """An accuracy, the steps to reach it in, and the highest learning rate."""

    steps: int
    accuracy: float
    lr: float


@dataclass(frozen=True)
class Learner:
    """One candidate, ready to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    predict: Callable[[Tensor], Tensor]  # images -> logits


def ours(
    model: nn.Module, device: str, dtype: torch.dtype, *, compiled: bool, wrap: Wrap = lambda m: m
) -> Learner:
    """fastmp: 16-bit weights; unscale, overflow check and clip are in the optimizer."""
    model = fastmp.convert(copy.deepcopy(model), dtype)
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=MAX_NORM)
    scaler = fastmp.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = wrap(model)

    def loss_of(images: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        partner = torch.arange(len(images) - 1, -1, -1, device=images.device)
        mean, std = ((value,) * images.shape[1] for value in (MEAN, STD))
        x = fastmp.functional.mix(images, lam, partner, mean=mean, std=std, dtype=dtype)
        return fastmp.functional.cross_entropy(
            called(x), labels, label_smoothing=SMOOTHING, target_b=labels.flip(0), lam=lam
        )

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(((images.float() / 255 - MEAN) / STD).to(dtype))
        return logits

    step = _step(optimizer, scaler, torch.compile(loss_of) if compiled else loss_of)
    return Learner(model, optimizer, step, predict)


def torch_amp(
    model: nn.Module, device: str, dtype: torch.dtype, *, compiled: bool, wrap: Wrap = lambda m: m
) -> Learner:
    """PyTorch: autocast to ``dtype``, or fp32; unscale and clip as in its documentation."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = wrap(model)

    def autocast() -> Any:
        return torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext()

    def loss_of(images: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        with autocast():
            x = images.float() * (1 / (255 * STD)) - MEAN / STD
            logits = called(lam * x + (1 - lam) * x.flip(0))
            one, two = (
                F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
                for y in (labels, labels.flip(0))
            )
            return lam * one + (1 - lam) * two

    def clip() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    def predict(images: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = model((images.float() / 255 - MEAN) / STD)
            return logits

    step = _step(optimizer, scaler, torch.compile(loss_of) if compiled else loss_of, clip)
    return Learner(model, optimizer, step, predict)


def _step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    clip: Callable[[], None] = lambda: None,
) -> Step:
    def step(images: Tensor, labels: Tensor, lam: float) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(images, labels, torch.tensor(lam, device=images.device))
        scaler.scale(loss).backward()
        clip()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def learners(
    workload: Workload, device: str, dtype: torch.dtype, *, compiled: bool
) -> dict[str, Learner]:
    """Every candidate, from the same weights; ``compiled``: with torch.compile too."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = workload.build(workload.shape, workload.classes).to(device)
    name = f"AMP {dtype_name(dtype)}"
    candidates = {
        OURS: ours(model, device, dtype, compiled=False),
        name: torch_amp(model, device, dtype, compiled=False),
        "fp32": torch_amp(model, device, torch.float32, compiled=False),
    }
    if compiled:
        candidates[f"compiled {name}"] = torch_amp(model, device, dtype, compiled=True)
    if compiled and device == "cuda":  # on a CPU it gains nothing, and compiling takes minutes
        candidates[OURS_COMPILED] = ours(model, device, dtype, compiled=True)
    return candidates


def batch(workload: Workload, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, *workload.shape)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(workload.classes, (workload.batch,), generator=generator)
    return images.to(device), labels.to(device)


def step_case(
    workload: Workload, device: str, dtype: torch.dtype, seconds: float, *, compiled: bool
) -> list[Row]:
    """The time of a step on random images."""
    images, labels = batch(workload, device)
    runs = {
        name: partial(learner.step, images, labels, LAM)
        for name, learner in learners(workload, device, dtype, compiled=compiled).items()
    }
    first = {name: float(run()) for name, run in runs.items()}
    check(first, first[OURS])
    size = "x".join(map(str, workload.shape))
    label = f"{workload.name} step, {dtype_name(dtype)}, {workload.batch} images {size}"
    timings = timed(dict(runs), seconds, label, step_clock(device))
    last = {name: float(run()) for name, run in runs.items()}
    check(last, first[OURS])  # every candidate took as many steps
    notes = f"losses {first[OURS]:.4f} to " + ", ".join(f"{k} {v:.4f}" for k, v in last.items())
    return [Row("train", label, timings, notes=notes, not_comparable=[OURS_COMPILED])]


def check(losses: dict[str, float], first: float) -> None:
    """Assert that the losses agree within 2% of the first."""
    assert all(abs(loss - losses[OURS]) < 0.02 * first for loss in losses.values()), losses


# ---- to a given accuracy ----

# Accuracies on the last, steep part of the schedule: a curve crosses each once.
TARGETS = {
    "mlp": Target(200, 0.866, 1e-3),
    "convnet": Target(200, 0.865, 4e-3),
    "vit": Target(60, 0.57, 2e-3),
}


def accuracy_case(
    workload: Workload, dataset: data.Dataset, device: str, dtype: torch.dtype, target: Target
) -> list[Row]:
    """Seconds of training until the accuracy on the first 2,000 test images is reached.

    The candidates take turns of 10 steps. Only the steps count: not compiling, reading the data and
    measuring the accuracy.
    """
    candidates = learners(workload, device, dtype, compiled=True)
    warm = batch(workload, device)
    for learner in candidates.values():
        before = [copy.deepcopy(part.state_dict()) for part in (learner.model, learner.optimizer)]
        learner.step(*warm, LAM)
        learner.model.load_state_dict(before[0])
        learner.optimizer.load_state_dict(before[1])
    harness.announce_compiled()
    curves: dict[str, Curve] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    schedule = OneCycle(target.lr, target.steps)
    batches = list(_batches(dataset, workload.batch, target.steps, device))
    test = _test_images(dataset, device)
    for start in range(0, target.steps, CHUNK):
        for name, learner in candidates.items():
            begin = time.perf_counter()
            for number in range(start, min(start + CHUNK, target.steps)):
                apply(learner.optimizer, *schedule(number))
                learner.step(*batches[number])
            if device == "cuda":
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - begin
            curves[name].append((spent[name], _accuracy(learner, test)))
    seconds = {name: _seconds_to(target.accuracy, curve, name) for name, curve in curves.items()}
    timings = {name: Timing(*[1e3 * value] * 3) for name, value in seconds.items()}
    label = f"{workload.name} to {target.accuracy:.1%} of {dataset.name}, {dtype_name(dtype)}"
    ends = ", ".join(f"{name} {curve[-1][1]:.2%}" for name, curve in curves.items())
    notes = f"after {target.steps} steps: {ends}"
    return [
        Row("train", label, timings, notes=notes, not_comparable=[OURS_COMPILED], curves=curves)
    ]


def _batches(
    dataset: data.Dataset, size: int, steps: int, device: str
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Batches of training images with their λ, the same for every candidate."""
    torch.manual_seed(0)
    beta = torch.distributions.Beta(0.2, 0.2)
    loader = data.loader(dataset.train, size, shuffle=True)
    for number in range(steps):
        if number % len(loader) == 0:
            loader.set_epoch(number // len(loader))
            epoch = iter(loader)
        images, labels = next(epoch)
        yield images.to(device), labels.to(device), float(beta.sample())


def _test_images(dataset: data.Dataset, device: str) -> list[tuple[Tensor, Tensor]]:
    loader = data.loader(dataset.test, TESTED // 2, shuffle=False)
    return [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, 2)]


@torch.no_grad()
def _accuracy(learner: Learner, test: list[tuple[Tensor, Tensor]]) -> float:
    learner.model.eval()
    right = sum(int((learner.predict(x).argmax(1) == y).sum()) for x, y in test)
    learner.model.train()
    return right / sum(len(y) for _, y in test)


def _seconds_to(accuracy: float, curve: Curve, name: str) -> float:
    reached = (seconds for seconds, value in curve if value >= accuracy)
    seconds = next(reached, None)
    assert seconds is not None, f"{name} ended at {curve[-1][1]:.2%}, target {accuracy:.1%}"
    return seconds


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.5 if quick else SECONDS[device]
    on_gpu = device == "cuda"
    dtype = torch.float16 if on_gpu else torch.bfloat16
    gray, photo = (1, 28, 28), (3, 224, 224)
    small = [Workload(n, models.MODELS[n], gray, 10, 256) for n in ("mlp", "convnet", "vit")]
    large = [
        Workload("ResNet-50", networks.resnet50, photo, 1000, 256 if on_gpu else 8),
        Workload("ViT-B/16", networks.vit_b16, photo, 1000, 128 if on_gpu else 4),
    ]

    def step(workload: Workload, dtype: torch.dtype, *, compiled: bool) -> Case:
        rows = partial(step_case, workload, device, dtype, seconds, compiled=compiled)
        return Case(f"{workload.name} step {dtype_name(dtype)}", rows)

    if quick:
        return [step(small[0], dtype, compiled=False)]

    def accuracy(workload: Workload) -> list[Row]:
        dataset = data.load("fashion-mnist")
        return accuracy_case(workload, dataset, device, dtype, TARGETS[workload.name])

    return [
        *(step(workload, dtype, compiled=True) for workload in small + large),
        *([] if on_gpu else [step(small[0], torch.float16, compiled=False)]),
        *(
            Case(f"{workload.name} to an accuracy", partial(accuracy, workload))
            for workload in small
        ),
    ]
