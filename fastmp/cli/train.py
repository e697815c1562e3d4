"""``fastmp train``: a classifier with the whole recipe, on one device or on many."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from fastmp import files, recipe
from fastmp.checkpoint.manager import Checkpoints
from fastmp.cli import results
from fastmp.data import Dataset
from fastmp.distributed import rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.models import run as models_run
from fastmp.models.run import CONFIG
from fastmp.recipe import DTYPES, ConfigError, TrainConfig, resume
from fastmp.recipe.config import shown_default
from fastmp.training import rng
from fastmp.training.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Train an image classifier with mixed precision, mixup, label smoothing and one-cycle."""

    config: Annotated[Path | None, shown_default("PATH", "none")] = None
    """TOML file with any of these settings, such as the config.toml of a run; flags override it."""

    resume: bool = False
    """Go on from the newest complete checkpoint in --out; where there is none yet, start."""

    recipe: Annotated[
        TrainConfig, tyro.conf.arg(name="", help="The recipe; the defaults work as they are.")
    ] = dataclasses.field(default_factory=TrainConfig)


def main(arguments: Sequence[str]) -> None:
    """Train an image classifier with mixed precision, mixup, label smoothing and one-cycle."""
    given = _parsed(arguments)
    with rendezvous.torchrun_group(recipe.device_of(given.recipe)) as world:
        command = shlex.join(["fastmp", "train", *arguments])
        run(given.recipe, world, resume=given.resume, command=command)


def _parsed(arguments: Sequence[str]) -> Train:
    """The flags, over the values of the config file, over those of a resumed run, the defaults."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--out", type=Path)
    finder.add_argument("--resume", action="store_true")
    found = finder.parse_known_args(arguments)[0]
    defaults = TrainConfig()
    if found.resume:
        out = found.out
        if out is None and found.config is not None:
            out = recipe.read_toml(found.config).out
        if out is None:
            raise ConfigError("resume: expected --out with the folder of the run, got no folder")
        if (out / CONFIG).exists():
            defaults = recipe.read_toml(out / CONFIG)
    if found.config is not None:
        defaults = recipe.read_toml(found.config, defaults)
    given = tyro.cli(
        Train, prog="fastmp train", args=arguments, default=Train(found.config, False, defaults)
    )
    return dataclasses.replace(given, recipe=given.recipe.one_lr(defaults))


def run(config: TrainConfig, world: World, *, resume: bool = False, command: str = "") -> None:
    """Train with this recipe; write metrics, checkpoints, curves and a report to a folder.

    Args:
        config: not resolved.
        world: the processes that train together.
        resume: go on with the run in the folder.
        command: the line that started it, for the report.
    """
    config.resolved(world.size)  # refused before any work
    out = world.broadcast_object(_run_folder(config, resume))
    with _held(out) if world.is_first else nullcontext():
        config = dataclasses.replace(config, out=out)
        _train(config, out, world, resuming=resume, command=command)


def _train(given: TrainConfig, out: Path, world: World, *, resuming: bool, command: str) -> None:
    def print_rank0(text: str) -> None:
        if world.is_first:
            print(text)

    started = resuming and Checkpoints(out / "checkpoints").newest() is not None
    changed, commands = "", [command] if command else []
    if started:
        commands = list(dict.fromkeys([*recipe.commands_in(out / CONFIG), *commands]))
        recorded = recipe.read_toml(out / CONFIG)
        changed = resume.changes(recorded, given, out)
        given = dataclasses.replace(given, dtype=recorded.dtype)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = recipe.device_of(given)
    dataset = recipe.load_data(given)
    config = given.resolved(world.size, len(dataset.train))
    model = recipe.build_model(config, dataset)
    pretrained = None if started else recipe.load_pretrained(config, model)
    train_loader, test_loader = recipe.loaders(config, dataset, device, world)
    steps = math.ceil(len(train_loader) / config.accumulate)
    print_rank0(_summary(config, dataset, model, device, world, steps))
    if pretrained is not None:
        print_rank0(f"{config.init_from}: {pretrained}")
    config = dataclasses.replace(
        config, dtype=recipe.choose_dtype(config, dataset, model, device, world)
    )
    assert config.epochs is not None
    trainer = recipe.build_trainer(
        config,
        dataset,
        model,
        DTYPES[config.dtype],
        device,
        total_steps=steps * config.epochs,
        folder=out,
        world=world,
    )
    rng.seed(config.seed + world.rank)  # dropout does not depend on what was drawn before
    loaded = resuming and resume.load_newest(trainer, config)
    remaining = config.epochs - trainer.epoch
    if loaded and remaining:
        where = f"resumed at step {trainer.step}, epoch {trainer.epoch + 1}"
        print_rank0(f"{where}; changed: {changed}" if changed else where)
    with results.reported(config, dataset, trainer, commands):
        if remaining:
            # the lr as given: a run resumed on another number of devices scales it again
            with _recorded(dataclasses.replace(config, lr=given.lr), commands, dataset, trainer):
                trainer.fit(train_loader, test_loader, remaining)
        else:
            done = f"{trainer.epoch} of {config.epochs} epochs are done"
            print_rank0(f"nothing left to train: {done}")
            if world.is_first:  # runs of earlier versions have none of these files
                models_run.write_about(out, dataset)
    print_rank0(_next_steps(out))


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """``out``, created where it is not there, for this process alone; removed if it stays empty."""
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        recipe.make_folder("out", out)
        with files.locked(out):
            yield
    finally:
        for folder in created:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _recorded(
    config: TrainConfig, commands: Sequence[str], dataset: Dataset, trainer: Trainer
) -> Iterator[None]:
    """Write the settings into the run's folder; the former ones, if not one step runs with them."""
    assert config.out is not None
    path, first = config.out / CONFIG, trainer.step
    former = path.read_bytes() if path.exists() else None
    if trainer.world.is_first:
        recipe.write_toml(config, path, commands)
        models_run.write_about(config.out, dataset)
    try:
        yield
    except BaseException:
        if trainer.world.is_first and former is not None and trainer.step == first:
            files.atomic_write(path, former)
        raise


def _summary(
    config: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    device: torch.device,
    world: World,
    steps: int,
) -> str:
    """Data, what is to be known of them, model, device and batch, a line each."""
    assert config.batch_size is not None
    machine = f"{world.size} x {device.type}" if world.size > 1 else str(device)
    given = config.batch_size * world.size * config.accumulate
    batch = config.global_batch(world.size, len(dataset.train))
    factors = [f"{config.batch_size} a device", f"{world.size} devices"]
    factors += [f"{config.accumulate} passes"] if config.accumulate > 1 else []
    parts = f" = {' x '.join(factors)}" if given > config.batch_size else ""
    if batch < given:
        parts = f", all that the data has for the {given:,} of the settings"
    size = sum(parameter.numel() for parameter in model.parameters())
    few = f"one step an epoch, {config.epochs} in all: a smaller --batch-size than "
    few = f"\n{few}{config.batch_size:,} gives more" if steps == 1 else ""
    return (
        f"{config.data}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"val images of {'x'.join(map(str, dataset.shape))}, {len(dataset.classes)} classes\n"
        + "".join(f"  {note}\n" for note in dataset.notes)
        + f"{config.model}: {size:,} parameters, on {machine}\n"
        f"global batch: {batch:,}{parts}; {_count(steps, 'step')} an epoch; "
        f"peak lr {config.lr:.3g}{few}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _next_steps(out: Path) -> str:
    """The commands that use a finished run."""
    run = shlex.quote(str(out))
    return (
        f"\nThe run is in {out}\n"
        f"  look     {out / 'report.html'}\n"
        f"  predict  fastmp predict {run} IMAGE...\n"
        f"  export   fastmp export {run} --format onnx\n"
        f"  Python   model = fastmp.load({str(out)!r}); model.predict('image.png')"
    )


def _run_folder(config: TrainConfig, resume: bool) -> Path:
    """The folder of the run; refused before any work if it holds anything else."""
    if config.out is not None:
        out = config.out
        in_use = out.exists() and (
            not out.is_dir() or any(path.name != files.LOCK for path in out.iterdir())
        )
        if in_use and not (resume and (out / CONFIG).is_file()):
            wanted = f"the folder of a run, with {CONFIG}" if resume else "a new or empty folder"
            hint = "" if resume else "; --resume goes on with the run that is there"
            raise ConfigError(f"out: expected {wanted}, {out} is not{hint}")
        return out
    model = config.model.replace(":", ".")
    name = Path(config.data).resolve().name.replace(":", "-")  # of "." too
    return Path("runs") / f"{name}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
