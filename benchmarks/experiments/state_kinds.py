"""Accuracy with moments in bf16 and 8 bits: each kind against fp32, over seeds.

    python -m benchmarks.experiments.state_kinds [--epochs 4] [--seeds 3] [--models convnet vit]
    python -m benchmarks.experiments.state_kinds --text [--steps 300] [--seeds 5]
    ... [--device cuda] [--processes 15]

Fashion-MNIST (from ``$FASTMP_DATA``), the recipe of ``fastmp train`` in bf16: test accuracy after
the last epoch, no more than 0.3 points below fp32 moments. ``--text``: a GPT-2 of 10 M parameters
on a synthetic text, whose next token is one of four that the two tokens before it choose; the final
loss of each kind lies within the spread of the seeds with fp32 moments.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmp
from benchmarks import experiments
from benchmarks.experiments import RunAll, fashion_mnist
from benchmarks.experiments.convergence import accuracies
from fastmp.recipe import TrainConfig

KINDS: dict[str, Any] = {"fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"}
VOCABULARY, LENGTH, WIDTH, LAYERS = 512, 64, 384, 5


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 6, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2 with its input embedding as output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def text(batch: int, successors: Tensor, generator: torch.Generator) -> Tensor:
    """Sequences whose next token is one of four, chosen by the two before it."""
    ids = torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=generator)
    choices = torch.multinomial(
        torch.tensor([0.6, 0.2, 0.15, 0.05]), batch * (LENGTH + 1), True, generator=generator
    ).view(batch, LENGTH + 1)
    for i in range(2, LENGTH + 1):
        pair = (ids[:, i - 1] * 31 + ids[:, i - 2] % 4) % len(successors)
        ids[:, i] = successors[pair, choices[:, i]]
    return ids


def final_loss(name: str, seed: int, steps: int, device: str, batch: int = 16) -> float:
    """The mean loss of the last tenth of the steps, with moments of ``KINDS[name]``."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(VOCABULARY, (2048, 4), generator=generator)
    torch.manual_seed(seed)
    model = fastmp.convert(Gpt().to(device), torch.bfloat16)
    optimizer = fastmp.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, max_grad_norm=1.0,
        state_dtype=KINDS[name],
    )  # fmt: skip
    losses = []
    samples = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 30)
        ids = text(batch, successors, samples).to(device)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def final_accuracy(name: str, seed: int, epochs: int, device: str, model: str) -> float:
    """Test accuracy after the last epoch, with moments of ``KINDS[name]``."""
    config = TrainConfig(
        data="fashion-mnist", model=model, epochs=epochs, seed=seed, state_dtype=name
    )
    return accuracies(config, fashion_mnist(), torch.device(device), progress=False)[-1]


def by_kind(run_all: RunAll, function: Any, seeds: int, *rest: Any) -> list[dict[str, Any]]:
    """A run for each seed: the seed, and the result for each kind of moments."""
    jobs = [(name, seed, *rest) for seed in range(seeds) for name in KINDS]
    results = iter(run_all(function, jobs))
    return [{"seed": seed, **{name: next(results) for name in KINDS}} for seed in range(seeds)]


def on_text(seeds: int, steps: int, device: str, run_all: RunAll) -> None:
    runs = by_kind(run_all, final_loss, seeds, steps, device)
    base = [run["fp32"] for run in runs]
    lines = [
        f"\nGPT-2, 10 M parameters, bf16, {steps} steps of synthetic text; loss at the end.\n",
        "| moments | mean of the seeds | least | most |",
        "| --- | --- | --- | --- |",
    ]
    for name in KINDS:
        found = [run[name] for run in runs]
        row = (statistics.mean(found), min(found), max(found))
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in row) + " |")
    for name in list(KINDS)[1:]:
        inside = min(base) <= statistics.mean(run[name] for run in runs) <= max(base)
        lines.append(f"\n{name}: {'within' if inside else '**outside**'} the spread of the seeds.")
    experiments.save("state_kinds_text", {"steps": steps, "runs": runs}, lines, device)


def on_images(seeds: int, epochs: int, models: list[str], device: str, run_all: RunAll) -> None:
    runs = [
        {"model": model, **run}
        for model in models
        for run in by_kind(run_all, final_accuracy, seeds, epochs, device, model)
    ]
    lines = [
        f"\nFashion-MNIST, bf16, {epochs} epochs; mean test accuracy after the last one.\n",
        "| model | " + " | ".join(f"{name} moments" for name in KINDS) + " |",
        "| --- " * (len(KINDS) + 1) + "|",
    ]
    verdicts = []
    for model in models:
        means = [statistics.mean(r[name] for r in runs if r["model"] == model) for name in KINDS]
        lines.append(f"| {model} | " + " | ".join(f"{mean:.2%}" for mean in means) + " |")
        differences = [100 * (mean - means[0]) for mean in means[1:]]
        found = ", ".join(f"{d:+.2f}" for d in differences)
        reached = "reached" if min(differences) >= -0.3 else "**missed**"
        verdicts.append(f"\n{model}: {found} points (goal: no more than 0.3 below: {reached}).")
    content = {"epochs": epochs, "runs": runs}
    experiments.save("state_kinds", content, [*lines, *verdicts], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    with experiments.pool(options.processes) as run_all:
        if options.text:
            on_text(options.seeds, options.steps, options.device, run_all)
        else:
            on_images(options.seeds, options.epochs, options.models, options.device, run_all)


if __name__ == "__main__":
    main()
