"""A whole training step: forward, loss, backward, overflow check in fp16, clip, AdamW.

Small networks on images of Fashion-MNIST's shape, and the common ones: ResNet-50, ViT-B/16 (timm's,
where installed), GPT-2 of 124 M parameters (transformers', where installed), and on a GPU ResNet-18
at 32 pixels, whose kernels take an eighth of the host's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmp import data, models
from fastmp.bench import accuracy, learners, networks
from fastmp.bench.clocks import step_clock
from fastmp.bench.harness import OURS, Case, Row, dtype_name, timed
from fastmp.bench.workloads import Images, Text, Workload
from fastmp.models import Shape

SECONDS = {"cpu": 15.0, "cuda": 3.0}
SMALL = ("mlp", "convnet", "vit")


def step_case(
    workload: Workload, device: str, dtype: torch.dtype, seconds: float, *, compiled: bool
) -> list[Row]:
    """The time of a step on a random batch."""
    inputs = workload.inputs(device)
    modes = learners.MODES if compiled else ("eager",)
    made = learners.candidates(workload, device, dtype, modes)
    first = learners.losses(made, inputs)
    learners.check(first, first[OURS])
    label = f"{workload.name} step, {dtype_name(dtype)}, {workload.label}"
    runs = {name: partial(learner.step, *inputs) for name, learner in made.items()}
    timings = timed(dict(runs), seconds, label, step_clock(device))
    last = learners.losses(made, inputs)
    learners.check(last, first[OURS])  # every candidate took as many steps
    notes = f"losses {first[OURS]:.4f} to " + ", ".join(f"{k} {v:.4f}" for k, v in last.items())
    own = learners.own_modes(workload, device, modes)
    if len(own) > 1:
        notes = f"{OURS} is {workload.own_mode}; {notes}"
    goals = _goals(workload, list(timings)) if device == "cuda" else {}
    return [Row("train", label, timings, goals=goals, notes=notes, not_comparable=list(own)[1:])]


def _goals(workload: Workload, names: list[str]) -> dict[str, float]:
    """The workload's, by the whole names of the candidates."""
    found = {start: [n for n in names if n.startswith(start)] for start in workload.goals}
    return {names[0]: workload.goals[start] for start, names in found.items() if names}


def large(on_gpu: bool) -> list[Workload]:
    """The common networks, as far as they are installed."""
    photo = (3, 224, 224)
    found: list[Workload] = [
        images("ResNet-50", networks.resnet50, photo, 1000, 256 if on_gpu else 8,
               own_mode="compiled", goals={"compiled AMP": 1.05}),
        images("ViT-B/16", networks.timm_vit_b16() or networks.vit_b16, photo, 1000,
               128 if on_gpu else 4, own_mode="compiled", goals={"compiled AMP": 1.15}),
    ]  # fmt: skip
    if on_gpu:
        goals = {"AMP": 5.0, "reduce-overhead AMP": 1.3}
        shape = (3, 32, 32)
        found.append(
            images("ResNet-18", networks.resnet18, shape, 10, 256, own_mode="graphed", goals=goals)
        )
    gpt2 = networks.gpt2()
    if gpt2 is not None:
        batch, length = (8, 1024) if on_gpu else (1, 128)
        found.append(
            Text(
                name="GPT-2 124M",
                make=gpt2,
                vocabulary=50257,
                batch=batch,
                length=length,
                own_mode="compiled",
                goals={"compiled AMP": 1.15},
            )
        )
    return found


def images(
    name: str,
    make: Callable[[Shape, int], nn.Module],
    shape: Shape,
    classes: int,
    batch: int,
    **options: Any,
) -> Images:
    """Random images for a model of that shape and number of classes."""
    model = partial(make, shape, classes)
    return Images(name=name, make=model, shape=shape, classes=classes, batch=batch, **options)


def cases(device: str, quick: bool) -> list[Case]:
    """Every case of this subject."""
    seconds = 0.5 if quick else SECONDS[device]
    on_gpu = device == "cuda"
    dtype = torch.float16 if on_gpu else torch.bfloat16
    small = [images(n, models.MODELS[n], (1, 28, 28), 10, 256) for n in SMALL]

    def step(workload: Workload, dtype: torch.dtype, *, compiled: bool) -> Case:
        rows = partial(step_case, workload, device, dtype, seconds, compiled=compiled)
        return Case(f"{workload.name} step {dtype_name(dtype)}", rows)

    if quick:
        return [step(small[0], dtype, compiled=False)]

    def to_accuracy(workload: Images) -> list[Row]:
        dataset = data.load("fashion-mnist")
        target = accuracy.TARGETS[workload.name]
        return accuracy.accuracy_case(workload, dataset, device, dtype, target)

    return [
        *(step(workload, dtype, compiled=True) for workload in small + large(on_gpu)),
        *([] if on_gpu else [step(small[0], torch.float16, compiled=False)]),
        *(Case(f"{work.name} to an accuracy", partial(to_accuracy, work)) for work in small),
    ]
