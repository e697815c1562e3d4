"""A whole training step, and the seconds to a given accuracy.

One step is what a recipe does with a batch of uint8 images: normalise, mixup, forward, loss of the
mixed pair with smoothing, backward, overflow check where there is a loss scale, clip, AdamW. fastmp
converts the model and keeps masters; torch runs autocast, eager and compiled, or fp32, with
AdamW(fused=True). All have the same weights, batches, λ and schedule.
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
from fastmp.bench import networks
from fastmp.bench.harness import OURS, Case, Curve, Row, Run, Timing, dtype_name, step_clock, timed
from fastmp.bench.rivals import SMOOTHING
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import OneCycle

LR = 1e-4  # small: all candidates must still agree after some dozens of steps on one batch
LAM = 0.7
MAX_NORM = 1.0
SECONDS = {"cpu": 15.0, "cuda": 3.0}
MEAN, STD = 0.3, 0.35
CHUNK = 10  # steps between two looks at the accuracy
LOOK = 2000  # test images
Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Work:
    """A model, and how many images of which shape a step has."""

    name: str
    build: Callable[[models.Shape, int], nn.Module]
    shape: models.Shape
    classes: int
    batch: int


class Aim(NamedTuple):
    """How long to train at most, until when, and the highest learning rate."""

    steps: int
    accuracy: float
    lr: float


@dataclass(frozen=True)
class Learner:
    """One candidate, ready to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor, float], Tensor]  # (images, labels, λ) -> loss
    predict: Callable[[Tensor], Tensor]  # images -> logits


def ours(
    model: nn.Module, device: str, dtype: torch.dtype, *, compiled: bool, wrap: Wrap | None = None
) -> Learner:
    """fastmp's way."""
    model = fastmp.convert(copy.deepcopy(model), dtype)
    optimizer = fastmp.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=MAX_NORM)
    scaler = fastmp.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = model if wrap is None else wrap(model)

    def loss_of(images: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        partner = torch.arange(len(images) - 1, -1, -1, device=images.device)
        mean, std = ((value,) * images.shape[1] for value in (MEAN, STD))
        x = fastmp.functional.mix(images, lam, partner, mean=mean, std=std, dtype=dtype)
        return fastmp.functional.cross_entropy(
            called(x), labels, label_smoothing=SMOOTHING, target_b=labels.flip(0), lam=lam
        )

    run = torch.compile(loss_of) if compiled else loss_of

    def step(images: Tensor, labels: Tensor, lam: float) -> Tensor:
        optimizer.zero_grad()
        loss = run(images, labels, torch.tensor(lam, device=device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(((images.float() / 255 - MEAN) / STD).to(dtype))
        return logits

    return Learner(model, optimizer, step, predict)


def torchs(
    model: nn.Module,
    device: str,
    dtype: torch.dtype,
    *,
    compiled: bool,
    wrap: Wrap | None = None,
) -> Learner:
    """PyTorch's way: autocast to ``dtype``, or fp32; unscale and clip as its pages say."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    called = model if wrap is None else wrap(model)

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

    run = torch.compile(loss_of) if compiled else loss_of

    def step(images: Tensor, labels: Tensor, lam: float) -> Tensor:
        optimizer.zero_grad()
        loss = run(images, labels, torch.tensor(lam, device=device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def predict(images: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = model((images.float() / 255 - MEAN) / STD)
            return logits

    return Learner(model, optimizer, step, predict)


def learners(
    work: Work, device: str, dtype: torch.dtype, *, compiled: bool, wrap: Wrap | None = None
) -> dict[str, Learner]:
    """Every candidate, from the same weights; ``compiled``: with torch.compile too."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = work.build(work.shape, work.classes).to(device)
    name = f"AMP {dtype_name(dtype)}"
    made = {
        OURS: ours(model, device, dtype, compiled=False, wrap=wrap),
        name: torchs(model, device, dtype, compiled=False, wrap=wrap),
        "fp32": torchs(model, device, torch.float32, compiled=False, wrap=wrap),
    }
    if compiled:
        made[f"compiled {name}"] = torchs(model, device, dtype, compiled=True)
    if compiled and device == "cuda":  # on a CPU it gains nothing, and compiling takes minutes
        made["fastmp, compiled"] = ours(model, device, dtype, compiled=True)
    return made


def batch(work: Work, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (work.batch, *work.shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(work.classes, (work.batch,), generator=generator)
    return images.to(device), labels.to(device)


def step_case(
    work: Work, device: str, dtype: torch.dtype, seconds: float, *, compiled: bool
) -> list[Row]:
    """The time of a step on random images."""
    made = learners(work, device, dtype, compiled=compiled)
    images, labels = batch(work, device)
    runs: dict[str, Run] = {
        name: partial(learner.step, images, labels, LAM) for name, learner in made.items()
    }
    first = {name: float(run()) for name, run in runs.items()}  # type: ignore[arg-type]
    _agree(first, first[OURS])
    label = f"{work.name} step, {dtype_name(dtype)}, {work.batch} images {_size(work.shape)}"
    timings = timed(runs, seconds, label, step_clock(device))
    last = {name: float(run()) for name, run in runs.items()}  # type: ignore[arg-type]
    _agree(last, first[OURS])  # every candidate took as many steps: they learnt the same
    notes = f"losses {first[OURS]:.4f} to " + ", ".join(f"{k} {v:.4f}" for k, v in last.items())
    return [Row("train", label, timings, notes=notes, aside=["fastmp, compiled"])]


def _agree(losses: dict[str, float], first: float) -> None:
    assert all(abs(loss - losses[OURS]) < 0.02 * first for loss in losses.values()), losses


def _size(shape: models.Shape) -> str:
    return "x".join(map(str, shape))


# ---- to a given accuracy ----

# Accuracies on the last, steep part of the schedule: a curve crosses each once.
AIMS = {"mlp": Aim(200, 0.866, 1e-3), "convnet": Aim(200, 0.865, 4e-3), "vit": Aim(60, 0.57, 2e-3)}


def accuracy_case(
    work: Work, dataset: data.Dataset, device: str, dtype: torch.dtype, aim: Aim
) -> list[Row]:
    """Seconds of training until the accuracy on the first 2,000 test images is reached.

    The candidates take turns of 10 steps. Compiling, reading the data and looking at the accuracy
    do not count.
    """
    steps, target, lr = aim
    made = learners(work, device, dtype, compiled=True)
    warm = batch(work, device)
    for learner in made.values():
        before = [copy.deepcopy(part.state_dict()) for part in (learner.model, learner.optimizer)]
        learner.step(*warm, LAM)
        learner.model.load_state_dict(before[0])
        learner.optimizer.load_state_dict(before[1])
    curves: dict[str, Curve] = {name: [] for name in made}
    spent = dict.fromkeys(made, 0.0)
    schedule = OneCycle(lr, steps)
    batches = list(_batches(dataset, work.batch, steps, device))
    test = _first(dataset, device)
    for start in range(0, steps, CHUNK):
        for name, learner in made.items():
            begun = time.perf_counter()
            for number in range(start, min(start + CHUNK, steps)):
                apply(learner.optimizer, *schedule(number))
                learner.step(*batches[number])
            if device == "cuda":
                torch.cuda.synchronize()
            spent[name] += time.perf_counter() - begun
            curves[name].append((spent[name], _accuracy(learner, test)))
    seconds = {name: _reached(curve, target, name) for name, curve in curves.items()}
    timings = {name: Timing(*[1e3 * value] * 3) for name, value in seconds.items()}
    label = f"{work.name} to {target:.1%} of {dataset.name}, {dtype_name(dtype)}"
    notes = f"after {steps} steps: " + ", ".join(f"{k} {c[-1][1]:.2%}" for k, c in curves.items())
    aside = ["fastmp, compiled"]
    return [Row("train", label, timings, notes=notes, aside=aside, curves=curves)]


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


def _first(dataset: data.Dataset, device: str) -> list[tuple[Tensor, Tensor]]:
    loader = data.loader(dataset.test, LOOK // 2, shuffle=False)
    return [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, 2)]


@torch.no_grad()
def _accuracy(learner: Learner, test: list[tuple[Tensor, Tensor]]) -> float:
    learner.model.eval()
    right = sum(int((learner.predict(x).argmax(1) == y).sum()) for x, y in test)
    learner.model.train()
    return right / sum(len(y) for _, y in test)


def _reached(curve: Curve, target: float, name: str) -> float:
    for seconds, accuracy in curve:
        if accuracy >= target:
            return seconds
    raise AssertionError(f"{name} ended at {curve[-1][1]:.2%}, {target:.1%} was the aim")


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.5 if quick else SECONDS[device]
    on_gpu = device == "cuda"
    dtype = torch.float16 if on_gpu else torch.bfloat16
    gray, photo = (1, 28, 28), (3, 224, 224)
    small = [Work(n, models.MODELS[n], gray, 10, 256) for n in ("mlp", "convnet", "vit")]
    large = [
        Work("ResNet-50", networks.resnet50, photo, 1000, 256 if on_gpu else 8),
        Work("ViT-B/16", networks.vit_b16, photo, 1000, 128 if on_gpu else 4),
    ]

    def step(work: Work, dtype: torch.dtype, *, compiled: bool) -> Case:
        make = partial(step_case, work, device, dtype, seconds, compiled=compiled)
        return Case(f"{work.name} step {dtype_name(dtype)}", make)

    if quick:
        return [step(small[0], dtype, compiled=False)]

    def accuracy(work: Work) -> list[Row]:
        return accuracy_case(work, data.load("fashion-mnist"), device, dtype, AIMS[work.name])

    return [
        *(step(work, dtype, compiled=True) for work in small + large),
        *([] if on_gpu else [step(small[0], torch.float16, compiled=False)]),
        *(Case(f"{work.name} to an accuracy", partial(accuracy, work)) for work in small),
    ]
