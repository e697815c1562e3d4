"""Half the epochs: the whole recipe against a constant learning rate.

    python -m benchmarks.experiments.convergence [--epochs 8] [--seeds 3]

Fashion-MNIST, convnet, bf16. The constant run has the same optimizer, clipping and weight decay,
the learning rate that PyTorch gives AdamW, no mixup and no smoothing. The recipe has
half its epochs, with one-cycle, mixup, label smoothing and the learning rate scaled to the batch.
Reached means: its final test accuracy is at least that of the constant run. Fashion-MNIST comes
from ``$FASTMP_DATA``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import torch

from benchmarks.experiments import save
from fastmp import data, recipe
from fastmp.data import Dataset
from fastmp.distributed.rendezvous import World
from fastmp.recipe import TrainConfig

CPU = torch.device("cpu")
CONSTANT_LR = 1e-3


def accuracies(
    config: TrainConfig, dataset: Dataset, device: torch.device = CPU, progress: bool = True
) -> list[float]:
    """Test accuracy after each epoch, as ``fastmp train`` would train."""
    config = config.resolved()
    assert config.epochs is not None
    train, test = recipe.loaders(config, dataset, device, World())
    trainer = recipe.build_trainer(
        config,
        dataset,
        recipe.build_model(config, dataset),
        torch.bfloat16,
        device,
        total_steps=config.epochs * len(train),
        progress=progress,
    )
    torch.manual_seed(config.seed)
    return [result.val_accuracy for result in trainer.fit(train, test, config.epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    dataset = data.load("fashion-mnist")
    whole = TrainConfig(data="fashion-mnist", model="convnet", epochs=options.epochs // 2)
    constant = dataclasses.replace(
        whole,
        epochs=options.epochs,
        lr=CONSTANT_LR,
        schedule="constant",
        warmup=0.0,
        momentum=0.9,
        mixup=0.0,
        label_smoothing=0.0,
    )
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        theirs = accuracies(dataclasses.replace(constant, seed=seed), dataset)
        ours = accuracies(dataclasses.replace(whole, seed=seed), dataset)
        runs.append({"seed": seed, "constant": theirs, "recipe": ours})
        print(runs[-1], flush=True)
        write(options.epochs, runs)


def write(epochs: int, runs: list[dict[str, Any]]) -> None:
    content = {"epochs": epochs, "runs": runs}
    means = [statistics.mean(run[key][-1] for run in runs) for key in ("constant", "recipe")]
    best = statistics.mean(max(run["constant"]) for run in runs)
    reached = sum(run["recipe"][-1] >= run["constant"][-1] for run in runs)
    lines = [
        "\nFashion-MNIST, convnet, bf16; test accuracy after the last epoch.",
        f"Constant lr {CONSTANT_LR:g}.\n",
        f"| seed | constant lr, {epochs} epochs | best of these | recipe, {epochs // 2} epochs |",
        "| --- | --- | --- | --- |",
        *(
            f"| {r['seed']} | {r['constant'][-1]:.2%} | {max(r['constant']):.2%} "
            f"| {r['recipe'][-1]:.2%} |"
            for r in runs
        ),
        f"| mean | {means[0]:.2%} | {best:.2%} | **{means[1]:.2%}** |",
        f"\nAs accurate in half the epochs: {reached} of {len(runs)} seeds; "
        f"in the mean {'reached' if means[1] >= means[0] else '**missed**'} "
        f"({100 * (means[1] - means[0]):+.2f} points).",
    ]
    save("convergence", content, lines)


if __name__ == "__main__":
    main()
