"""Curves and report of a run, written when it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from fastmp.report import html
from fastmp.report.environment import environment
from fastmp.training import confusion
from fastmp.training.confusion import Confusion
from fastmp.training.evaluation import eval_mode

if TYPE_CHECKING:
    from fastmp.training.trainer import Trainer

T = TypeVar("T")


def write(folder: Path, page: html.Page) -> None:
    """Write ``curves.png`` and ``report.html``; what cannot be written is a warning."""

    def draw() -> None:
        from fastmp.report import curves  # imports Matplotlib

        curves.draw(folder, page.title)

    attempt("curves.png", draw)
    attempt("report.html", lambda: html.write(folder, page))


def write_of_trainer(trainer: Trainer, val_loader: Iterable[Any] | None) -> None:
    """Write them for a trainer whose ``fit`` has ended, on its first rank."""
    assert trainer.folder is not None
    found: Confusion | None = None
    if val_loader is not None and trainer.world.size == 1:
        found = attempt("the confusion matrix", lambda: _confusion(trainer, val_loader))
    classes = () if found is None else tuple(map(str, range(len(found.counts))))
    page = html.Page(
        type(trainer.model).__name__,
        trainer.facts(),
        environment(trainer.device),
        data={"classes": str(len(classes))} if classes else {},
        classes=classes,
        confusion=found,
    )
    write(trainer.folder, page)


def _confusion(trainer: Trainer, val_loader: Iterable[Any]) -> Confusion | None:
    """Of the validation, with the number of classes that the model's logits have."""
    settings, model = trainer.settings, trainer.model
    plain = nn.Identity() if settings.mixup is None else settings.mixup.plain

    def logits(images: Tensor) -> Tensor:
        found: Tensor = model(plain(images))
        return found

    averaged = nullcontext() if trainer.ema is None else trainer.ema.swapped_in()
    with averaged, eval_mode(model):
        return confusion.measure(logits, map(settings.prepare_batch, val_loader), trainer.device)


def attempt(name: str, make: Callable[[], T]) -> T | None:
    """Call ``make``; an error of any kind is a warning: a report must not lose its run."""
    try:
        return make()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        print(
            f"fastmp: warning: {name} could not be made: {type(error).__name__}: {reason}",
            file=sys.stderr,
        )
        return None
