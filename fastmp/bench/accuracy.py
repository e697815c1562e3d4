"""Seconds of training to a given accuracy."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmp import data
from fastmp.bench import harness, learners
from fastmp.bench.harness import Curve, Row, Timing, dtype_name
from fastmp.bench.learners import Learner
from fastmp.bench.workloads import Images
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import OneCycle

CHUNK = 10  # steps between two measurements of the accuracy
TESTED = 2000  # images


class Target(NamedTuple):
    """An accuracy, the steps to reach it in, and the highest learning rate."""

    steps: int
    accuracy: float
    lr: float


# Accuracies on the last, steep part of the schedule: a curve crosses each once.
TARGETS = {
    "mlp": Target(200, 0.866, 1e-3),
    "convnet": Target(200, 0.865, 4e-3),
    "vit": Target(60, 0.57, 2e-3),
}


def accuracy_case(
    workload: Images, dataset: data.Dataset, device: str, dtype: torch.dtype, target: Target
) -> list[Row]:
    """Seconds of training until the accuracy on the first 2,000 test images is reached.

    The candidates take turns of 10 steps. Only the steps count: not compiling, reading the data and
    measuring the accuracy. Without CUDA graphs: the host sets the learning rate of every step.
    """
    modes = ("eager", "compiled")
    made = learners.candidates(workload, device, dtype, modes)
    warm = workload.inputs(device)
    for learner in made.values():
        before = [copy.deepcopy(part.state_dict()) for part in (learner.model, learner.optimizer)]
        learner.step(*warm)
        learner.model.load_state_dict(before[0])
        learner.optimizer.load_state_dict(before[1])
    harness.announce_compiled()
    curves: dict[str, Curve] = {name: [] for name in made}
    spent = dict.fromkeys(made, 0.0)
    schedule = OneCycle(target.lr, target.steps)
    batches = list(_batches(dataset, workload.batch, target.steps, device))
    test = _test_images(workload, dataset, device)
    for start in range(0, target.steps, CHUNK):
        for name, learner in made.items():
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
    others = list(learners.own_modes(workload, device, modes))[1:]
    return [Row("train", label, timings, notes=notes, not_comparable=others, curves=curves)]


def _batches(
    dataset: data.Dataset, size: int, steps: int, device: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of training images with their λ, the same for every candidate."""
    torch.manual_seed(0)
    beta = torch.distributions.Beta(0.2, 0.2)
    loader = data.loader(dataset.train, size, shuffle=True)
    for number in range(steps):
        if number % len(loader) == 0:
            loader.set_epoch(number // len(loader))
            epoch = iter(loader)
        images, labels = next(epoch)
        yield images.to(device), labels.to(device), beta.sample().to(device)


def _test_images(
    workload: Images, dataset: data.Dataset, device: str
) -> list[tuple[Tensor, Tensor]]:
    loader = data.loader(dataset.test, TESTED // 2, shuffle=False)
    pairs = itertools.islice(loader, 2)
    return [(workload.normalised(x.to(device)), y.to(device)) for x, y in pairs]


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
