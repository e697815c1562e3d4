"""``fastmp train``: a classifier with the whole recipe, on one device or on many."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import tyro
from torch import nn

from fastmp import backends, doctor, recipe
from fastmp.data import Dataset
from fastmp.distributed import rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.recipe import DTYPES, ConfigError, DtypeName, TrainConfig, dtype_probe
from fastmp.report import curves, html
from fastmp.training import log, rng
from fastmp.training.trainer import Trainer

CONFIG = "config.toml"  # its name in a run folder


@dataclass(frozen=True)
class Train:
    """Train an image classifier with mixed precision, mixup, label smoothing and one-cycle."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
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
        run(given.recipe, world, resume=given.resume)


def _parsed(arguments: Sequence[str]) -> Train:
    """The flags, over the values of the config file, over the defaults."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--out", type=Path)
    finder.add_argument("--resume", action="store_true")
    found = finder.parse_known_args(arguments)[0]
    path = found.config
    if found.resume:
        if found.out is None:
            raise ConfigError("resume: expected --out with the folder of the run, got no folder")
        if (found.out / CONFIG).exists():
            path = found.out / CONFIG
    defaults = TrainConfig() if path is None else recipe.read_toml(path)
    given = tyro.cli(
        Train, prog="fastmp train", args=arguments, default=Train(found.config, False, defaults)
    )
    return dataclasses.replace(given, recipe=given.recipe.one_lr(defaults))


def run(config: TrainConfig, world: World, *, resume: bool = False) -> None:
    """Train with this recipe; write metrics, checkpoints, curves and a report to a folder."""
    given, config = config, config.resolved(world.size)
    out = world.broadcast_object(_run_folder(config, resume))

    def print_rank0(text: str) -> None:
        if world.is_first:
            print(text)

    if config.threads:
        torch.set_num_threads(config.threads)
    device = recipe.device_of(config)
    dataset = recipe.load_data(config)
    model = recipe.build_model(config, dataset)
    pretrained = recipe.load_pretrained(config, model)
    print_rank0(_summary(config, dataset, model, device, world))
    if pretrained is not None:
        print_rank0(f"{config.init_from}: {pretrained}")
    dtype_name = _choose_dtype(config, dataset, model, device, world)
    config = dataclasses.replace(config, dtype=dtype_name, out=out)
    epochs = config.epochs
    assert epochs is not None
    train_loader, test_loader = recipe.loaders(config, dataset, device, world)
    if world.is_first:
        recipe.make_folder("out", out)
        # the lr as given: a run resumed on another number of devices scales it again
        recipe.write_toml(dataclasses.replace(config, lr=given.lr), out / CONFIG)
    trainer = recipe.build_trainer(
        config,
        dataset,
        model,
        DTYPES[dtype_name],
        device,
        total_steps=math.ceil(len(train_loader) / config.accumulate) * epochs,
        folder=out,
        world=world,
    )
    rng.seed(config.seed + world.rank)  # dropout does not depend on what was drawn before
    if resume and trainer.resume_newest():
        print_rank0(f"resumed at step {trainer.step}, epoch {trainer.epoch + 1}")
    try:
        results = trainer.fit(train_loader, test_loader, epochs - trainer.epoch)
    finally:
        if trainer.step and world.is_first:  # also after an error or a signal
            title = f"{config.model} on {config.data}, {dtype_name}"
            curves.draw(out, title)
            html.write(out, title, _facts(config, trainer, device), doctor.environment(device))
    if not results:
        print_rank0(f"nothing left to train: {trainer.epoch} of {epochs} epochs are done")
    print_rank0(_table(_facts(config, trainer, device)))
    print_rank0(
        f"\nThe run is in {out}: report.html, curves.png, {CONFIG}, {log.FILE}, checkpoints/"
    )


def _summary(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device, world: World
) -> str:
    """Data, model, device and batch, in three lines."""
    assert config.batch_size is not None
    machine = f"{world.size} x {device.type}" if world.size > 1 else str(device)
    batch = config.batch_size * world.size * config.accumulate
    factors = [f"{config.batch_size} a device", f"{world.size} devices"]
    factors += [f"{config.accumulate} passes"] if config.accumulate > 1 else []
    parts = f" = {' x '.join(factors)}" if batch > config.batch_size else ""
    return (
        f"{config.data}: {len(dataset.train):,} training and {len(dataset.test):,} "
        f"test images of {'x'.join(map(str, dataset.shape))}, {len(dataset.classes)} classes\n"
        f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, on {machine}\n"
        f"global batch: {batch:,}{parts}; peak lr {config.lr:.3g}"
    )


def _run_folder(config: TrainConfig, resume: bool) -> Path:
    """The folder of the run; refused before any work if it holds anything else."""
    if config.out is not None:
        out = config.out
        in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if in_use and not (resume and (out / CONFIG).is_file()):
            wanted = f"the folder of a run, with {CONFIG}" if resume else "a new or empty folder"
            hint = "" if resume else "; --resume goes on with the run that is there"
            raise ConfigError(f"out: expected {wanted}, {out} is not{hint}")
        return out
    model = config.model.replace(":", ".")
    name = Path(config.data).name.replace(":", "-")
    return Path("runs") / f"{name}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def _choose_dtype(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device, world: World
) -> DtypeName:
    """The dtype to train in; with "auto" the first rank measures and the others follow."""
    if config.dtype != "auto":
        return config.dtype
    fastest = _measure_dtypes(config, dataset, model, device) if world.is_first else None
    return cast(DtypeName, world.broadcast_object(fastest))


def _measure_dtypes(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device
) -> str:
    assert config.batch_size is not None
    plain = dataclasses.replace(config, cuda_graph=False, telemetry=False, shard=False)
    steps: dict[str, dtype_probe.Step] = {}
    for name, dtype in DTYPES.items():
        trainer = recipe.build_trainer(
            plain, dataset, model, dtype, device, total_steps=1000, progress=False, world=World()
        )
        steps[name] = functools.partial(_step, trainer, dataset)
    measured = dtype_probe.fastest(steps, min(config.batch_size, len(dataset.train)))
    print(f"dtype: {measured}")
    return measured.chosen


def _step(trainer: Trainer, dataset: Dataset, samples: int) -> None:
    trainer.train_step([dataset.train.batch(list(range(samples)))])
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


# ---- the table at the end ----


def _facts(config: TrainConfig, trainer: Trainer, device: torch.device) -> dict[str, str]:
    """The results of the run, from its log, which includes the steps before a resume."""
    assert trainer.folder is not None
    epochs = log.read(trainer.folder / log.FILE, "epoch")
    seconds = sum(row["seconds"] for row in epochs)
    samples = sum(row["seconds"] * row["samples_per_second"] for row in epochs)
    masters = "" if config.dtype == "fp32" else ", fp32 masters"
    facts = {}
    if epochs:
        facts["test accuracy"] = f"{epochs[-1]['val_accuracy']:.2%} after {len(epochs)} epochs"
        facts["training time"] = f"{seconds:.1f} s"
        facts["speed"] = f"{samples / seconds:,.0f} samples/s"
    facts["weights"] = f"{config.dtype}{masters}"
    facts["skipped steps"] = f"{int(trainer.optimizer.skipped_steps)} of {trainer.step}"
    facts["peak memory"] = f"{_peak_memory(device) / 2**20:,.0f} MiB"
    for served in backends.report():
        if served.device == device.type:
            facts[served.op] = f"{served.backend} ({served.reason})"
    return facts


def _table(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def _peak_memory(device: torch.device) -> int:
    """Bytes: the peak of the device's allocator, or on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
