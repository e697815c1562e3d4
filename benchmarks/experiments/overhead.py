"""The trainer's overhead: its step, with schedule, log and records, against the bare step.

    python -m benchmarks.experiments.overhead [--rounds 200]

Fashion-MNIST's shapes, batch 256, bf16, mixup, smoothing, clipping: the same kernels on both sides,
in the order of a hand-written loop, interleaved in one process; the weights must end equal bit
for bit. The trainer writes its JSON lines and TensorBoard events to a folder, as in a real run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.experiments import save
from fastmp import amp, models, optim
from fastmp.data.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import OneCycle
from fastmp.training.trainer import Trainer

GOAL = 0.02


def parts(name: str, rounds: int) -> tuple[nn.Module, optim.AdamW, CrossEntropyLoss, Mixup, Any]:
    torch.manual_seed(0)
    model = amp.convert(models.build(name, (1, 28, 28), 10), torch.bfloat16)
    return (
        model,
        optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0),
        CrossEntropyLoss(label_smoothing=0.1),
        Mixup(
            generator=torch.Generator().manual_seed(0),
            mean=[0.3],
            std=[0.35],
            dtype=torch.bfloat16,
        ),
        OneCycle(1e-3, rounds),
    )


def bare(name: str, rounds: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    model, optimizer, criterion, mixup, schedule = parts(name, rounds)
    done = 0

    def step(images: Tensor, labels: Tensor) -> None:
        nonlocal done
        inputs, target = mixup(images, labels)
        loss = criterion(model(inputs), target)
        loss.backward()
        apply(optimizer, *schedule(done))
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    return model, step


def wrapped(
    name: str, rounds: int, out: Path
) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    model, optimizer, criterion, mixup, schedule = parts(name, rounds)
    trainer = Trainer(model, optimizer, criterion, schedule=schedule, mixup=mixup, folder=out)
    return model, lambda images, labels: trainer.train_step([(images, labels)])


def measure(name: str, rounds: int, out: Path) -> dict[str, float]:
    """Milliseconds a step, medians, and the median of the differences of neighbours."""
    sides = {"bare": bare(name, rounds), "trainer": wrapped(name, rounds, out)}
    images = torch.randint(0, 256, (256, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (256,))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in tqdm(range(rounds), desc=name, leave=False):
        for side in sorted(sides, reverse=bool(number % 2)):
            started = time.perf_counter()
            sides[side][1](images, labels)
            times[side].append(1e3 * (time.perf_counter() - started))
    for one, two in zip(
        sides["bare"][0].parameters(), sides["trainer"][0].parameters(), strict=True
    ):
        assert torch.equal(one, two)
    pairs = list(zip(times["bare"], times["trainer"], strict=True))[5:]
    result = {side: statistics.median(values[5:]) for side, values in times.items()}
    return {**result, "difference": statistics.median(b - a for a, b in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        rows = {
            name: measure(name, options.rounds, Path(out) / name)
            for name in ("convnet", "vit", "mlp")
        }
    lines = [
        "\nA training step of 256 images 28x28 in bf16, ms; the difference is the median over "
        "neighbouring pairs.\n",
        "| model | bare | trainer | difference | of a step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        fraction = row["difference"] / row["bare"]
        missed = "" if fraction <= GOAL else " **missed**"
        lines.append(
            f"| {name} | {row['bare']:.2f} | {row['trainer']:.2f} | {row['difference']:.2f} "
            f"| {fraction:.1%}{missed} |"
        )
    save("overhead", {"rows": rows}, lines)


if __name__ == "__main__":
    main()
