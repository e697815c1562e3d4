"""The command line. ``fastmp train`` trains a classifier with the whole recipe."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import tyro
from torch import nn

from fastmp import backends, curves, data, models, probe, recipe
from fastmp.data import Dataset
from fastmp.recipe import DTYPES, ConfigError, DtypeName, TrainConfig
from fastmp.trainer import EpochResult, RunStopped, Trainer

USER_ERRORS = (ConfigError, data.DataError, models.ModelError)  # theirs to mend: no traceback


@dataclass(frozen=True)
class Train:
    """Train an image classifier with mixed precision, mixup, label smoothing and one-cycle."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """TOML file with any of these settings, such as the config.toml of a run; flags override it."""

    recipe: Annotated[
        TrainConfig, tyro.conf.arg(name="", help="The recipe; the defaults work as they are.")
    ] = dataclasses.field(default_factory=TrainConfig)


def main(arguments: Sequence[str]) -> int:
    """Run ``fastmp`` with these arguments.

    Returns:
        0: done; 1: the run was stopped, its state saved; 2: bad usage or bad input.
    """
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command not in COMMANDS:
        print(f"fastmp: error: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except USER_ERRORS as error:
        print(f"fastmp {command}: error: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"fastmp {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"fastmp {command}: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def _usage() -> str:
    lines = [f"  {name:<8} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastmp COMMAND [FLAGS]",
            "",
            "commands:",
            *lines,
            "",
            "fastmp COMMAND --help: flags",
        ]
    )


# ---- fastmp train ----


def train(arguments: Sequence[str]) -> None:
    """Train an image classifier with mixed precision, mixup, label smoothing and one-cycle."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    defaults = TrainConfig() if path is None else recipe.read_toml(path)
    parsed = tyro.cli(Train, prog="fastmp train", args=arguments, default=Train(path, defaults))
    run(parsed.recipe)


def run(config: TrainConfig) -> None:
    """Train as ``config`` says, and leave the metrics, the checkpoint and a picture in a folder."""
    config = config.resolved()
    assert config.epochs is not None
    assert config.batch_size is not None
    out = _run_folder(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = recipe.device_of(config)
    dataset = data.load(config.data)
    model = recipe.build_model(config, dataset)
    print(
        f"{config.data}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} "
        f"test images of {'x'.join(map(str, dataset.shape))}, {len(dataset.classes)} classes\n"
        f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, on {device}"
    )
    train_loader = data.loader(
        dataset.train_images,
        dataset.train_labels,
        config.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(config.seed),
    )
    test_loader = data.loader(dataset.test_images, dataset.test_labels, 1000, shuffle=False)
    dtype_name = _dtype(config, dataset, model, device)
    out.mkdir(parents=True, exist_ok=True)
    recipe.write_toml(dataclasses.replace(config, dtype=dtype_name, out=out), out / "config.toml")
    trainer = recipe.build_trainer(
        config,
        dataset,
        model,
        DTYPES[dtype_name],
        device,
        total_steps=math.ceil(len(train_loader) / config.accumulate) * config.epochs,
        folder=out,
    )
    torch.manual_seed(config.seed)  # whatever was drawn before, dropout starts here
    try:
        results = trainer.fit(train_loader, test_loader, config.epochs)
    finally:
        if trainer.step:  # a run that was stopped has its picture too
            curves.draw(out, title=f"{config.model} on {config.data}, {dtype_name}")
    print(_table(config, trainer, results, dtype_name, device))
    print(f"\nThe run is in {out}: config.toml, metrics.jsonl, checkpoint/, curves.png")


def _run_folder(config: TrainConfig) -> Path:
    """Where the run writes; refused here, before any work, if something is there already."""
    if config.out is not None:
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise ConfigError(f"out: expected a new or empty folder, {config.out} is not")
        return config.out
    model = config.model.replace(":", ".")
    return Path("runs") / f"{config.data}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def _dtype(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device
) -> DtypeName:
    """The name of the dtype to train in, measured if the recipe leaves it open."""
    if config.dtype != "auto":
        return config.dtype
    assert config.batch_size is not None
    steps: dict[str, probe.Step] = {}
    for name, dtype in DTYPES.items():
        trainer = recipe.build_trainer(
            config, dataset, model, dtype, device, total_steps=1000, progress=False
        )
        steps[name] = functools.partial(_step, trainer, dataset)
    verdict = probe.fastest(steps, min(config.batch_size, len(dataset.train_labels)))
    print(f"dtype: {verdict}")
    return cast(DtypeName, verdict.chosen)


def _step(trainer: Trainer, dataset: Dataset, samples: int) -> None:
    trainer.train_step([(dataset.train_images[:samples], dataset.train_labels[:samples])])
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


# ---- the table at the end ----


def _table(
    config: TrainConfig,
    trainer: Trainer,
    results: list[EpochResult],
    dtype_name: DtypeName,
    device: torch.device,
) -> str:
    seconds = sum(result.seconds for result in results)
    samples = sum(result.seconds * result.samples_per_second for result in results)
    skipped = int(trainer.optimizer.skipped_steps)
    masters = "" if dtype_name == "fp32" else ", fp32 masters"
    rows = [
        ("test accuracy", f"{results[-1].val_accuracy:.2%} after {len(results)} epochs"),
        ("training time", f"{seconds:.1f} s"),
        ("speed", f"{samples / seconds:,.0f} samples/s"),
        ("weights", f"{dtype_name}{masters}"),
        ("skipped steps", f"{skipped} of {trainer.step}"),
        ("peak memory", f"{_peak_memory(device) / 2**20:,.0f} MiB"),
    ]
    rows += [
        (served.op, f"{served.backend} ({served.reason})")
        for served in backends.report()
        if served.device == device.type
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _peak_memory(device: torch.device) -> int:
    """Bytes: what the device's allocator held at most, or on the CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


#: Every command, by its name.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train}
