"""``fastmp lr-find``: the learning-rate range test, on the recipe of ``fastmp train``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastmp import recipe
from fastmp.distributed.rendezvous import World
from fastmp.recipe import DTYPES, TrainConfig
from fastmp.recipe.config import shown_default
from fastmp.report.run import attempt
from fastmp.training import lr_find


@dataclass(frozen=True)
class LrFind:
    """Find a peak learning rate: raise it step by step and watch the loss."""

    config: Annotated[Path | None, shown_default("PATH", "none")] = None
    """TOML file with any settings of fastmp train; flags override it."""

    low: float = 1e-6
    """First learning rate."""

    high: float = 1.0
    """Last learning rate, unless the loss explodes before."""

    steps: int = 100
    """Steps from one to the other."""

    picture: Path = Path("lr-find.png")
    """Where the curve goes."""

    recipe: Annotated[
        TrainConfig, tyro.conf.arg(name="", help="The recipe, as of fastmp train.")
    ] = dataclasses.field(default_factory=TrainConfig)


def main(arguments: Sequence[str]) -> None:
    """Find a peak learning rate: raise it step by step and watch the loss."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    defaults = TrainConfig() if path is None else recipe.read_toml(path)
    default = LrFind(config=path, recipe=defaults)
    given = tyro.cli(LrFind, prog="fastmp lr-find", args=arguments, default=default)
    run(dataclasses.replace(given, recipe=given.recipe.one_lr(defaults)))


def run(given: LrFind) -> None:
    """Run the test, print the suggestion and draw the curve."""
    lr_find.check(given.low, given.high, given.steps)
    given.recipe.resolved()  # refused before any work
    if given.recipe.threads:
        torch.set_num_threads(given.recipe.threads)
    device = recipe.device_of(given.recipe)
    dataset = recipe.load_data(given.recipe)
    config = given.recipe.resolved(samples=len(dataset.train))
    for note in dataset.notes:
        print(f"{config.data}: {note}")
    model = recipe.build_model(config, dataset)
    recipe.load_pretrained(config, model)
    dtype = DTYPES["fp32" if config.dtype == "auto" else config.dtype]
    recipe.make_folder("picture", given.picture.parent)
    train_loader, _ = recipe.loaders(config, dataset, device, World())
    trainer = recipe.build_trainer(
        config,
        dataset,
        model,
        dtype,
        device,
        total_steps=given.steps,
        progress=False,
        world=World(),
    )
    found = lr_find.find(trainer, train_loader, low=given.low, high=given.high, steps=given.steps)

    def draw() -> None:
        from fastmp.report import lr_curve  # imports Matplotlib

        lr_curve.draw(found, given.picture)

    attempt(str(given.picture), draw)
    if math.isnan(found.suggestion):
        raise lr_find.RangeTestError(
            f"no suggestion: the loss did not fall from low={given.low:g} on before it was lowest; "
            f"take more steps than {given.steps}, or another low; the curve is in {given.picture}"
        )
    print(
        f"suggestion: --lr {found.suggestion:.2g} (where the loss falls fastest)\n"
        f"a tenth of where it is lowest: {found.at_minimum / 10:.2g}\n"
        f"for a batch of {config.batch_size} x {config.accumulate}; the curve is in {given.picture}"
    )
