"""The results of ``fastmp train``: the table, the picture and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastmp import data, recipe
from fastmp.checkpoint import weights
from fastmp.data import Dataset, folders
from fastmp.models import run as runs
from fastmp.recipe import TrainConfig
from fastmp.report import html
from fastmp.report import run as report
from fastmp.report.environment import environment
from fastmp.report.run import attempt
from fastmp.training import confusion, results
from fastmp.training.confusion import Confusion
from fastmp.training.trainer import Trainer

_CLASSES = 12  # names that are shown


@contextmanager
def reported(
    config: TrainConfig, dataset: Dataset, trainer: Trainer, commands: Sequence[str]
) -> Iterator[None]:
    """After the block, also after an error or a signal in it, write the files and print the table.

    The weights are saved by then: where a file cannot be written, a warning says why. After an
    ``OSError`` nothing is tried: the folder takes no files.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:  # as of a write to an open file
            error.filename = str(trainer.folder)
        raise
    except BaseException:
        _write_files(config, dataset, trainer, commands)
        raise
    _write_files(config, dataset, trainer, commands)
    if trainer.world.is_first:
        print(f"\n{results.table(_facts(config, trainer))}")


def _write_files(
    config: TrainConfig, dataset: Dataset, trainer: Trainer, commands: Sequence[str]
) -> None:
    out = trainer.folder
    if out is None or not trainer.step or not trainer.world.is_first:
        return

    found = None
    if (out / weights.FILE).exists():  # the run has ended
        found = attempt("the confusion matrix", lambda: _confusion(out, config, dataset, trainer))
    page = html.Page(
        f"{config.model} on {config.data}, {config.dtype}",
        _facts(config, trainer),
        environment(trainer.device),
        commands=commands,
        data={
            "training images": f"{len(dataset.train):,} of {'x'.join(map(str, dataset.shape))}",
            "val images": f"{len(dataset.test):,}",
            "classes": f"{len(dataset.classes)}: {folders.few(dataset.classes, _CLASSES)}",
        },
        recipe=recipe.effective(config),
        classes=dataset.classes,
        confusion=found,
    )
    report.write(out, page)


def _confusion(out: Path, config: TrainConfig, dataset: Dataset, trainer: Trainer) -> Confusion:
    """Of the model that the run leaves, over the images for validation."""
    model = runs.load(out, device=trainer.device)
    loader = data.loader(
        dataset.test, 256, shuffle=False, workers=recipe.workers(config), device=trainer.device
    )
    return confusion.measure(model, loader, trainer.device)


def _facts(config: TrainConfig, trainer: Trainer) -> dict[str, str]:
    """The results of the run, from its log, which includes the steps before a resume."""
    masters = "" if config.dtype == "fp32" else ", fp32 masters"
    return {**trainer.facts(), "weights": f"{config.dtype}{masters}"}  # shards are fp32
