"""The accuracy of 16-bit training: fastmp's recipe against plain PyTorch in fp32.

    python -m benchmarks.experiments.accuracy [--epochs 4] [--seeds 3] [--dtype bf16]

The same model, initial weights, order of samples, hyperparameters and number of epochs on both
sides; the loop of the PyTorch side uses no fastmp: fp32, eager mixup, two index losses,
``clip_grad_norm_``, ``AdamW(fused=True)``, ``OneCycleLR``. Fashion-MNIST, from ``$FASTMP_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.experiments import save
from fastmp import data, recipe
from fastmp.data import Dataset
from fastmp.recipe import DTYPES, DtypeName, TrainConfig

CPU = torch.device("cpu")


def torch_fp32(config: TrainConfig, dataset: Dataset, model: nn.Module, epochs: int) -> float:
    """Test accuracy of the recipe in plain PyTorch."""
    assert config.lr is not None
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others}],
        lr=config.lr,
        betas=(config.momentum, config.beta2),
        weight_decay=0.0,
        fused=True,
    )
    batches = loader(config, dataset)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        config.lr,
        total_steps=epochs * len(batches),
        pct_start=config.warmup,
        base_momentum=config.peak_momentum,
        max_momentum=config.momentum,
    )
    mean = torch.tensor(dataset.mean).view(1, -1, 1, 1)
    std = torch.tensor(dataset.std).view(1, -1, 1, 1)
    beta = torch.distributions.Beta(config.mixup, config.mixup)

    def normalised(images: Tensor) -> Tensor:
        return (images.float() / 255 - mean) / std

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        model.train()
        for images, labels in tqdm(batches, desc=f"torch fp32, epoch {epoch + 1}", leave=False):
            lam, partner = float(beta.sample()), torch.randperm(len(images))
            inputs = normalised(images)
            logits = model(lam * inputs + (1 - lam) * inputs[partner])
            loss = lam * loss_of(logits, labels) + (1 - lam) * loss_of(logits, labels[partner])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in data.loader(dataset.test, 1000, shuffle=False):
            right += int((model(normalised(images)).argmax(1) == labels).sum())
    return right / len(dataset.test)


def loader(config: TrainConfig, dataset: Dataset) -> data.Loader:
    assert config.batch_size is not None
    return data.loader(dataset.train, config.batch_size, shuffle=True, seed=config.seed)


def ours(
    config: TrainConfig, dataset: Dataset, model: nn.Module, epochs: int, dtype: str
) -> tuple[float, int]:
    """Test accuracy of the recipe as ``fastmp train`` runs it, and its skipped steps."""
    batches = loader(config, dataset)
    trainer = recipe.build_trainer(
        config,
        dataset,
        model,
        DTYPES[cast(DtypeName, dtype)],
        CPU,
        total_steps=epochs * len(batches),
    )
    test = data.loader(dataset.test, 1000, shuffle=False)
    results = trainer.fit(batches, test, epochs)
    return results[-1].val_accuracy, int(trainer.optimizer.skipped_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    options = parser.parse_args()
    dataset = data.load("fashion-mnist")
    runs = []
    for seed in range(options.seeds):
        config = TrainConfig(data="fashion-mnist", model="convnet", seed=seed).resolved()
        model = recipe.build_model(config, dataset)
        reached, skipped = ours(config, dataset, model, options.epochs, options.dtype)
        torch.manual_seed(seed)
        expected = torch_fp32(config, dataset, copy.deepcopy(model), options.epochs)
        runs.append({"seed": seed, "fastmp": reached, "torch_fp32": expected, "skipped": skipped})
        print(runs[-1], flush=True)
    write(runs, options.epochs, options.dtype)


def write(runs: list[dict[str, float]], epochs: int, dtype: str) -> None:
    ours, theirs = (statistics.mean(run[k] for run in runs) for k in ("fastmp", "torch_fp32"))
    content = {"epochs": epochs, "dtype": dtype, "runs": runs}
    lines = [
        f"\nFashion-MNIST, convnet, {epochs} epochs; test accuracy after the last one.\n",
        f"| seed | fastmp {dtype} | torch fp32 |",
        "| --- | --- | --- |",
        *(f"| {run['seed']} | {run['fastmp']:.2%} | {run['torch_fp32']:.2%} |" for run in runs),
        f"| mean | **{ours:.2%}** | {theirs:.2%} |",
        f"\nDifference of the means: {100 * (ours - theirs):+.2f} points "
        f"(goal: within 0.3; {'reached' if abs(ours - theirs) <= 0.003 else '**missed**'}).",
    ]
    save("accuracy", content, lines)


if __name__ == "__main__":
    main()
