"""Muon against AdamW: steps and seconds to an accuracy.

    python -m benchmarks.experiments.muon [convnet] [vit] [--seeds 3] [--quick]

Fashion-MNIST, bf16 weights, batches of 256, one-cycle, cross-entropy, clip at 1; accuracy on all
test images. AdamW runs with five learning rates at the reference length, all seeds; the best mean
counts, and is then run at other lengths. Muon runs with one learning rate, that of
``fastmp train --optimizer muon``, at the same lengths. A length is a whole schedule of its own: no
run ends at a high rate. Steps to the target: where the mean final accuracy, straight between the
lengths, crosses it. Target: 91.5% for the convnet, AdamW's own accuracy at the reference length for
the vit. The seconds are those of the steps alone, without reading data and testing. Fashion-MNIST
comes from ``$FASTMP_DATA``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import nn

import fastmp
from benchmarks.experiments import RESULTS, save
from fastmp import data, models, optim
from fastmp.bench.results import folder
from fastmp.data import Dataset
from fastmp.optim.base import FusedOptimizer
from fastmp.schedule import OneCycle

MUON_LR = 4e-3
DECAY = 0.02
BATCH = 256
FRACTIONS = (0.3, 0.45, 0.6, 0.75, 1.0)  # of the reference length


class Plan(NamedTuple):
    """Of one model: AdamW's rates, the reference length in steps, and the target."""

    lrs: tuple[float, ...]
    steps: int
    target: float | None  # None: AdamW's accuracy at the reference length


PLANS = {
    "convnet": Plan((1e-3, 2e-3, 4e-3, 8e-3, 16e-3), 800, 0.915),
    "vit": Plan((5e-4, 1e-3, 2e-3, 4e-3, 8e-3), 960, None),
}


class Run(NamedTuple):
    """One training."""

    optimizer: str
    lr: float
    steps: int
    seed: int
    seconds: float  # of the steps
    accuracy: float  # at the end


def make_optimizer(kind: str, model: nn.Module, lr: float) -> FusedOptimizer:
    """As ``fastmp train`` makes it."""
    groups = fastmp.transfer.layerwise_lr(model, lr, 1.0, weight_decay=DECAY)
    if kind == "adamw":
        return optim.AdamW(groups, lr=lr, max_grad_norm=1.0)
    groups = optim.muon_groups(model, groups=groups)
    return optim.Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw", max_grad_norm=1.0)


def train(name: str, kind: str, lr: float, steps: int, seed: int, dataset: Dataset) -> Run:
    """Train for ``steps``, then test."""
    torch.manual_seed(seed)
    model = fastmp.convert(models.build(name, dataset.shape, len(dataset.classes)), torch.bfloat16)
    optimizer = make_optimizer(kind, model, lr)
    OneCycle(lr, steps, pct_start=0.25).bind(optimizer)
    criterion = fastmp.nn.CrossEntropyLoss()
    loader = data.loader(dataset.train, BATCH, shuffle=True, seed=seed)
    seconds, done, epoch = 0.0, 0, 0
    while done < steps:
        loader.set_epoch(epoch)
        for images, labels in loader:
            if done == steps:
                break
            x = normalised(dataset, images)
            begin = time.perf_counter()
            optimizer.zero_grad()
            criterion(model(x), labels).backward()
            optimizer.step()
            seconds += time.perf_counter() - begin
            done += 1
        epoch += 1
    return Run(kind, lr, steps, seed, seconds, accuracy(model, dataset))


def normalised(dataset: Dataset, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (dataset.mean, dataset.std))
    return ((images.float() / 255 - mean) / std).bfloat16()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset) -> float:
    model.eval()
    right = 0
    for images, labels in data.loader(dataset.test, 1000, shuffle=False):
        right += int((model(normalised(dataset, images)).argmax(1) == labels).sum())
    model.train()
    return right / len(dataset.test)


def final(runs: Sequence[Run]) -> float:
    return statistics.mean(run.accuracy for run in runs)


def crossing(lengths: Sequence[int], accuracies: Sequence[float], target: float) -> float | None:
    """The length at which the accuracy reaches the target; None: not within these."""
    previous: tuple[int, float] | None = None
    for length, value in zip(lengths, accuracies, strict=True):
        if value >= target:
            if previous is None:
                return float(length)
            x, y = previous
            return x + (length - x) * (target - y) / (value - y)
        previous = length, value
    return None


def compare(name: str, plan: Plan, seeds: int, dataset: Dataset) -> dict[str, Any]:
    runs: list[Run] = []

    def mean_of(kind: str, lr: float, steps: int) -> float:
        made = [train(name, kind, lr, steps, seed, dataset) for seed in range(seeds)]
        runs.extend(made)
        print(f"{name} {kind} lr {lr:g}, {steps} steps: {final(made):.2%}", flush=True)
        return final(made)

    by_lr = {lr: mean_of("adamw", lr, plan.steps) for lr in plan.lrs}
    best = max(by_lr, key=lambda lr: by_lr[lr])
    target = by_lr[best] if plan.target is None else plan.target
    lengths = [round(plan.steps * fraction) for fraction in FRACTIONS]
    reached: dict[str, list[float]] = {"adamw": [], "muon": []}
    for steps in lengths:
        known = by_lr[best] if steps == plan.steps else mean_of("adamw", best, steps)
        reached["adamw"].append(known)
        reached["muon"].append(mean_of("muon", MUON_LR, steps))
    return {
        "model": name,
        "target": target,
        "adamw_lrs": {f"{lr:g}": value for lr, value in by_lr.items()},
        "best_lr": best,
        "lengths": lengths,
        "final": reached,
        "steps": {kind: crossing(lengths, values, target) for kind, values in reached.items()},
        "ms_per_step": {
            kind: 1e3 * statistics.median(run.seconds / run.steps for run in of_kind)
            for kind in reached
            if (of_kind := [run for run in runs if run.optimizer == kind])
        },
        "runs": [run._asdict() for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, one seed")
    options = parser.parse_args()
    dataset = data.load("fashion-mnist")
    found = []
    for name in options.models:
        plan = PLANS[name]
        if options.quick:
            plan = plan._replace(steps=plan.steps // 10, lrs=plan.lrs[2:3], target=None)
        found.append(compare(name, plan, 1 if options.quick else options.seeds, dataset))
        write(found)


def write(found: Sequence[dict[str, Any]]) -> None:
    lines = [
        f"\nFashion-MNIST, bf16, batches of {BATCH}, one-cycle; mean final test accuracy.",
    ]
    for result in found:
        rates = ", ".join(f"{lr}: {value:.2%}" for lr, value in result["adamw_lrs"].items())
        lines += [
            f"\n## {result['model']}\n",
            f"AdamW's rates at {result['lengths'][-1]} steps: {rates}; Muon's {MUON_LR:g}.\n",
            f"| steps | {' | '.join(map(str, result['lengths']))} |",
            "| --- |" + " --- |" * len(result["lengths"]),
            *(
                f"| {kind} | {' | '.join(f'{value:.2%}' for value in values)} |"
                for kind, values in result["final"].items()
            ),
            f"\n{_verdict(result)}",
        ]
        draw(result)
    save("muon", {"results": list(found)}, lines)


def _verdict(result: dict[str, Any]) -> str:
    steps, ms = result["steps"], result["ms_per_step"]
    head = f"To {result['target']:.2%}: "
    if steps["adamw"] is None or steps["muon"] is None:
        return head + f"not reached within these lengths ({steps})."
    ratio = steps["muon"] / steps["adamw"]
    seconds = ratio * ms["muon"] / ms["adamw"]
    reached = "reached" if ratio <= 0.75 and seconds <= 0.8 else "**missed**"
    return head + (
        f"AdamW {steps['adamw']:.0f} steps, Muon {steps['muon']:.0f}: {ratio:.2f}x the steps, "
        f"{seconds:.2f}x the seconds ({ms['muon']:.0f} against {ms['adamw']:.0f} ms a step; goal: "
        f"0.75x and 0.80x, {reached})."
    )


def draw(result: dict[str, Any]) -> None:
    """Accuracy at the end of runs of several lengths, against steps and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for kind, label in (("adamw", "AdamW, best of 5 rates"), ("muon", "Muon")):
        values = [100 * value for value in result["final"][kind]]
        seconds = [n * result["ms_per_step"][kind] / 1e3 for n in result["lengths"]]
        axes[0].plot(result["lengths"], values, marker="o", label=label)
        axes[1].plot(seconds, values, marker="o", label=label)
    for axis, unit in zip(axes, ("steps", "seconds of training"), strict=True):
        axis.axhline(100 * result["target"], color="gray", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"length of the run, {unit}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy at the end, %")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"Fashion-MNIST, {result['model']}: mean of the seeds")
    figure.savefig(folder(RESULTS) / f"muon-{result['model']}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
