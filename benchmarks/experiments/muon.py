"""Muon against AdamW: steps and seconds to an accuracy.

    python -m benchmarks.experiments.muon [convnet] [vit] [--device cuda] [--processes 15]
    python -m benchmarks.experiments.muon --time-only FILE [--device cpu]

Fashion-MNIST, bf16 weights, batches of 256, the optimizers and the one-cycle schedule of
``fastmp train``, cross-entropy, clip at 1; accuracy on all test images. AdamW runs with five
learning rates and Muon with four at the reference length, all seeds; the best mean of each counts,
and is then run at other lengths. A length is a whole schedule of its own: no run ends at a high
rate. Steps to the target: where the mean final accuracy, straight between the lengths, crosses it.
Target: 91.5% for the convnet, AdamW's own accuracy at the reference length for the vit.

The runs share the device when there are several processes; a step is timed afterwards, alone, the
optimizers in turn, without reading data. ``--time-only`` does only that, for the steps to the
target in FILE, a muon-convergence.json of any device. Fashion-MNIST comes from ``$FASTMP_DATA``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fastmp
from benchmarks import experiments
from benchmarks.experiments import RunAll, fashion_mnist
from fastmp import data, models, optim
from fastmp.bench.results import folder
from fastmp.optim.base import FusedOptimizer
from fastmp.report.environment import device_name
from fastmp.schedule import OneCycle

DECAY = 0.02
BATCH = 256
FRACTIONS = (0.2, 0.3, 0.45, 0.6, 0.8, 1.0)  # of the reference length
LABELS = {"adamw": "AdamW", "muon": "Muon"}
ROUNDS, STEPS_A_ROUND = 15, 5  # of the timing


Step = Callable[[Tensor, Tensor], Tensor]


class Plan(NamedTuple):
    """Of one model: the rates of either optimizer, the reference length in steps, the target."""

    lrs: dict[str, tuple[float, ...]]
    steps: int
    target: float | None  # None: AdamW's accuracy at the reference length


_MUON_LRS = (4e-3, 8e-3, 16e-3, 32e-3)
PLANS = {
    "convnet": Plan({"adamw": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "muon": _MUON_LRS}, 1200, 0.915),
    "vit": Plan({"adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "muon": _MUON_LRS}, 800, None),
}


class Run(NamedTuple):
    """One training."""

    model: str
    optimizer: str
    lr: float
    steps: int
    seed: int
    accuracy: float  # at the end


def make_optimizer(kind: str, model: nn.Module, lr: float) -> FusedOptimizer:
    """As ``fastmp train`` makes it."""
    groups = fastmp.transfer.layerwise_lr(model, lr, 1.0, weight_decay=DECAY)
    if kind == "adamw":
        return optim.AdamW(groups, lr=lr, max_grad_norm=1.0)
    groups = optim.muon_groups(model, groups=groups)
    return optim.Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw", max_grad_norm=1.0)


def make_step(
    name: str, kind: str, lr: float, steps: int, seed: int, device: str
) -> tuple[nn.Module, Step]:
    """A model, and a function of images (uint8) and labels that trains it one step."""
    torch.manual_seed(seed)
    dataset = fashion_mnist()
    model = models.build(name, dataset.shape, len(dataset.classes)).to(device)
    fastmp.convert(model, torch.bfloat16)
    optimizer = make_optimizer(kind, model, lr)
    OneCycle(lr, steps, pct_start=0.25).bind(optimizer)
    criterion = fastmp.nn.CrossEntropyLoss()
    normalise = normaliser(device)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = criterion(model(normalise(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def normaliser(device: str) -> Callable[[Tensor], Tensor]:
    dataset = fashion_mnist()
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return lambda images: ((images.float() / 255 - mean) / std).bfloat16()


def train(name: str, kind: str, lr: float, steps: int, seed: int, device: str) -> Run:
    """Train for ``steps``, then test."""
    model, step = make_step(name, kind, lr, steps, seed, device)
    train, on = fashion_mnist().train, torch.device(device)
    loader = data.loader(train, BATCH, shuffle=True, seed=seed, device=on)
    for i in range(0, steps, len(loader)):
        loader.set_epoch(i // len(loader))
        for _, batch in zip(range(steps - i), loader, strict=False):
            step(*batch)
    return Run(name, kind, lr, steps, seed, accuracy(model, device))


@torch.no_grad()
def accuracy(model: nn.Module, device: str) -> float:
    model.eval()
    normalise, test = normaliser(device), fashion_mnist().test
    loader = data.loader(test, 1000, shuffle=False, device=torch.device(device))
    right = sum((model(normalise(x)).argmax(1) == labels).sum() for x, labels in loader)
    return int(right) / len(test)


def ms_per_step(name: str, device: str, graph: bool = False) -> dict[str, float]:
    """Milliseconds of a step of either optimizer: medians, in turn, alone on the device.

    ``graph``: the steps are replayed as CUDA graphs; ``RuntimeError`` where that is impossible.
    """
    loader = data.loader(fashion_mnist().train, BATCH, shuffle=True, device=torch.device(device))
    batch = next(iter(loader))
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    steps: dict[str, Step] = {}
    for kind in LABELS:
        _, step = make_step(name, kind, 1e-3, 1000, 0, device)
        steps[kind] = fastmp.graphed(step) if graph else step
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for i in range(ROUNDS + 1):  # the first one loads code and allocates
        for kind, step in steps.items():
            synchronise()
            begin = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                step(*batch)
            synchronise()
            if i > 0:
                times[kind].append(1e3 * (time.perf_counter() - begin) / STEPS_A_ROUND)
    for step in steps.values():
        if reason := getattr(step, "reason", ""):
            raise RuntimeError(f"no CUDA graph: {reason}")
    return {kind: statistics.median(found) for kind, found in times.items()}


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


def compare(name: str, plan: Plan, seeds: int, device: str, run_all: RunAll) -> dict[str, Any]:
    """Everything but the seconds."""

    def means(cases: list[tuple[str, float, int]]) -> list[float]:
        """Mean final accuracy of each (optimizer, lr, steps)."""
        jobs = [(name, *case, seed, device) for case in cases for seed in range(seeds)]
        made: list[Run] = run_all(train, jobs)
        runs.extend(made)
        groups = [made[i : i + seeds] for i in range(0, len(made), seeds)]
        return [statistics.mean(run.accuracy for run in group) for group in groups]

    runs: list[Run] = []
    rates = [(kind, lr) for kind, lrs in plan.lrs.items() for lr in lrs]
    by_rate = dict(zip(rates, means([(*rate, plan.steps) for rate in rates]), strict=True))
    best = {
        kind: max(((kind, lr) for lr in lrs), key=by_rate.__getitem__)[1]
        for kind, lrs in plan.lrs.items()
    }
    lengths = [round(plan.steps * fraction) for fraction in FRACTIONS[:-1]]
    cases = [(kind, lr, steps) for kind, lr in best.items() for steps in lengths]
    shorter = dict(zip(cases, means(cases), strict=True))
    final = {
        kind: [*(shorter[kind, lr, steps] for steps in lengths), by_rate[kind, lr]]
        for kind, lr in best.items()
    }
    lengths.append(plan.steps)
    target = final["adamw"][-1] if plan.target is None else plan.target
    return {
        "model": name,
        "seeds": seeds,
        "target": target,
        "by_lr": {k: {f"{lr:g}": by_rate[k, lr] for lr in lrs} for k, lrs in plan.lrs.items()},
        "best_lr": best,
        "lengths": lengths,
        "final": final,
        "steps": {kind: crossing(lengths, values, target) for kind, values in final.items()},
        "runs": [run._asdict() for run in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, two rates")
    parser.add_argument("--time-only", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.time_only is not None:
        write_seconds(json.loads(options.time_only.read_text()), options.device)
        return
    found = []
    with experiments.pool(options.processes) as run_all:
        for name in options.models:
            plan = PLANS[name]
            if options.quick:
                lrs = {kind: rates[1:3] for kind, rates in plan.lrs.items()}
                plan = Plan(lrs, plan.steps // 10, None)
            found.append(compare(name, plan, options.seeds, options.device, run_all))
    for result in found:
        result["ms_per_step"] = ms_per_step(result["model"], options.device)
        if options.device == "cuda":
            result["ms_per_replay"] = ms_per_step(result["model"], options.device, graph=True)
    write(found, options.device)


def write(found: Sequence[dict[str, Any]], device: str) -> None:
    lines = [
        f"\nFashion-MNIST, bf16, batches of {BATCH}, one-cycle; final test accuracy on "
        f"{device_name(device)}, mean of {found[0]['seeds']} seeds; a step was timed alone, there.",
    ]
    for result in found:
        rates = (
            f"{LABELS[kind]} " + ", ".join(f"{lr}: {value:.2%}" for lr, value in values.items())
            for kind, values in result["by_lr"].items()
        )
        lines += [
            f"\n## {result['model']}\n",
            f"Learning rates at {result['lengths'][-1]} steps: {'; '.join(rates)}.\n",
            f"| steps | {' | '.join(map(str, result['lengths']))} |",
            "| --- |" + " --- |" * len(result["lengths"]),
            *(
                f"| {LABELS[kind]}, {result['best_lr'][kind]:g} | "
                f"{' | '.join(f'{value:.2%}' for value in values)} |"
                for kind, values in result["final"].items()
            ),
            f"\n{verdict(result, result['ms_per_step'])}",
        ]
        if "ms_per_replay" in result:
            lines.append(f"\nThe same as CUDA graphs. {verdict(result, result['ms_per_replay'])}")
        draw(result, device)
    experiments.save("muon-convergence", {"results": list(found)}, lines, device)


def write_seconds(convergence: dict[str, Any], device: str) -> None:
    """The steps of another file, in the seconds of this device."""
    lines = [f"\nSteps to the target: {convergence['device']}, {convergence['date']}. Timed here:"]
    rows = {}
    for result in convergence["results"]:
        name = result["model"]
        rows[name] = ms_per_step(name, device)
        lines.append(f"\n{name}. {verdict(result, rows[name])}")
    content = {"steps_of": convergence["device"], "ms_per_step": rows}
    experiments.save("muon-seconds", content, lines, device)


def verdict(result: dict[str, Any], ms: dict[str, float]) -> str:
    """Steps and seconds to the target, against the goals."""
    steps = result["steps"]
    head = f"To {result['target']:.2%}: "
    if steps["adamw"] is None or steps["muon"] is None:
        return head + f"not reached within these lengths ({steps})."
    ratio = steps["muon"] / steps["adamw"]
    seconds = ratio * ms["muon"] / ms["adamw"]
    verdicts = ["reached" if ok else "**missed**" for ok in (ratio <= 0.75, seconds <= 0.8)]
    return head + (
        f"AdamW {steps['adamw']:.0f} steps, Muon {steps['muon']:.0f}: {ratio:.2f}x the steps "
        f"(goal 0.75x: {verdicts[0]}), {seconds:.2f}x the seconds (goal 0.80x: {verdicts[1]}); "
        f"{ms['muon']:.3g} against {ms['adamw']:.3g} ms a step."
    )


def draw(result: dict[str, Any], device: str) -> None:
    """Accuracy at the end of runs of several lengths, against steps and against seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for kind, values in result["final"].items():
        label = f"{LABELS[kind]}, best of {len(result['by_lr'][kind])} learning rates"
        percent = [100 * value for value in values]
        seconds = [n * result["ms_per_step"][kind] / 1e3 for n in result["lengths"]]
        axes[0].plot(result["lengths"], percent, marker="o", label=label)
        axes[1].plot(seconds, percent, marker="o", label=label)
    units = ("steps", f"seconds of its steps, {device_name(device)}")
    for axis, unit in zip(axes, units, strict=True):
        target = result["target"]
        axis.axhline(100 * target, color="gray", linestyle="--", label=f"target, {target:.2%}")
        axis.set_xlabel(f"length of the run, {unit}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy at the end, %")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"Fashion-MNIST, {result['model']}: mean of {result['seeds']} seeds")
    name = f"muon-{result['model']}.svg"
    figure.savefig(folder(experiments.RESULTS, device) / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
