"""Transfer learning on Fashion-MNIST: eight classes first, then the other two from few examples.

    python -m benchmarks.experiments.transfer [--epochs 3] [--seeds 3]

The convnet is pretrained on eight classes, in bf16, with the recipe. The other two, shirt and coat,
are the hardest to tell apart. From 8, 32 and 128 examples of each, 150 steps with the same
optimizer, schedule and mixup, two ways: from those weights with a new head and smaller rates for
the lower layers, and from scratch. Tested on all 2,000 test images of the two. Fashion-MNIST from
``$FASTMP_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.experiments import save
from fastmp import amp, data, models, optim, transfer
from fastmp.data import Arrays, Dataset
from fastmp.data.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import OneCycle
from fastmp.training.trainer import Trainer

OTHERS = (4, 6)  # coat, shirt
EXAMPLES = (8, 32, 128)  # of each
STEPS, BATCH, LR = 150, 16, 2e-3


def part(source: Arrays, classes: list[int], each: int | None = None) -> Arrays:
    """The images of some classes, renumbered from 0; the first ``each`` of a class."""
    images, labels = [], []
    for number, label in enumerate(classes):
        index = (source.labels == label).nonzero().flatten()[:each]
        images.append(source.images[index])
        labels.append(torch.full((len(index),), number))
    return Arrays(torch.cat(images), torch.cat(labels))


def trained(
    model: nn.Module,
    dataset: Dataset,
    train: Arrays,
    test: Arrays,
    epochs: int,
    batch: int,
    **how: Any,
) -> float:
    """Train in bf16 with one-cycle, mixup and smoothing; the test accuracy."""
    amp.convert(model, torch.bfloat16)
    seed, lr, decay = how["seed"], how["lr"], how["decay"]
    loader = data.loader(train, batch, shuffle=True, seed=seed)
    groups = transfer.layerwise_lr(model, lr, decay, weight_decay=0.02)
    mixup = Mixup(
        0.2,
        generator=torch.Generator().manual_seed(seed),
        mean=dataset.mean,
        std=dataset.std,
        dtype=torch.bfloat16,
    )
    trainer = Trainer(
        model,
        optim.AdamW(groups, lr=lr, max_grad_norm=1.0),
        CrossEntropyLoss(label_smoothing=0.1),
        schedule=OneCycle(lr, epochs * len(loader)),
        mixup=mixup,
        progress=False,
    )
    trainer.fit(loader, [next(iter(loader))], epochs)  # tested once, at the end
    return trainer.evaluate(data.loader(test, 1000, shuffle=False)).accuracy


def run(dataset: Dataset, seed: int, epochs: int) -> dict[str, Any]:
    assert isinstance(dataset.train, Arrays)
    assert isinstance(dataset.test, Arrays)
    first = [label for label in range(10) if label not in OTHERS]
    torch.manual_seed(seed)
    body = models.build("convnet", dataset.shape, len(first))
    train, test = part(dataset.train, first), part(dataset.test, first)
    pretrained = trained(body, dataset, train, test, epochs, 256, seed=seed, lr=4e-3, decay=1.0)
    found: dict[str, Any] = {"seed": seed, "pretrained": pretrained, "few": []}
    test = part(dataset.test, list(OTHERS))
    for each in EXAMPLES:
        few = part(dataset.train, list(OTHERS), each)
        again = max(1, STEPS // max(1, len(few) // BATCH))
        torch.manual_seed(seed)
        model = models.build("convnet", dataset.shape, 2)
        how = {"seed": seed, "lr": LR}
        scratch = trained(copy.deepcopy(model), dataset, few, test, again, BATCH, decay=1.0, **how)
        transfer.load_pretrained(model, body)  # the head has another shape: it stays new
        ours = trained(model, dataset, few, test, again, BATCH, decay=0.7, **how)
        found["few"].append({"each": each, "scratch": scratch, "transfer": ours})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    dataset = data.load("fashion-mnist")
    runs = []
    for seed in range(options.seeds):
        runs.append(run(dataset, seed, options.epochs))
        print(runs[-1], flush=True)
    write(runs, options.epochs)


def write(runs: list[dict[str, Any]], epochs: int) -> None:
    content = {"epochs": epochs, "runs": runs}
    lines = [
        f"\nFashion-MNIST, convnet, bf16. {epochs} epochs on eight classes, then 150 steps of coat "
        f"against shirt from few examples; test accuracy, mean and range of {len(runs)} seeds.\n",
        "| examples of each | from scratch | transferred |",
        "| --- | --- | --- |",
    ]
    for i, each in enumerate(EXAMPLES):
        cells = []
        for kind in ("scratch", "transfer"):
            values = [r["few"][i][kind] for r in runs]
            mean = statistics.mean(values)
            cells.append(f"{mean:.1%} ({min(values):.1%} to {max(values):.1%})")
        lines.append(f"| {each} | {cells[0]} | **{cells[1]}** |")
    save("transfer", content, lines)


if __name__ == "__main__":
    main()
