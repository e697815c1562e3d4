"""``fastmp evaluate``: accuracy, each class and the confusion matrix of a run's model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastmp import data, recipe
from fastmp.data import Arrays, DataError, Source, folders
from fastmp.data.files import Images
from fastmp.models import run as runs
from fastmp.models.classifier import Classifier
from fastmp.recipe import TrainConfig
from fastmp.recipe.config import shown_default
from fastmp.training import confusion
from fastmp.training.confusion import Confusion

_BATCH = 256
_MOST_COLUMNS = 20  # of a confusion matrix in a terminal
_PAIRS = 10  # of classes, where there are more


@dataclass(frozen=True)
class Evaluate:
    """Print the accuracy of a run's model, that of each class, and the confusion matrix."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run of fastmp train, or one of its checkpoints."""

    data: Annotated[str | None, shown_default("NAME", "that of the run")] = None
    """Data set as of fastmp train, of which the part for validation is taken, or a folder of
    CLASS/*.jpg, of which all images are."""

    json: bool = False
    """Print one JSON object, with the whole matrix."""

    model: Annotated[str | None, shown_default("NAME", "as in the run")] = None
    """package.module:factory of the model, where it is not where the run had it."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if there is one."""


def main(arguments: Sequence[str]) -> None:
    """Accuracy, each class and the confusion matrix of a run's model."""
    run(tyro.cli(Evaluate, prog="fastmp evaluate", args=arguments))


def run(given: Evaluate) -> None:
    """Print the results.

    Raises:
        ConfigError: no such data set.
        DataError: images that cannot be read, or of other classes than the model's.
        RunError, CheckpointError, ModelError: as ``fastmp.load``.
    """
    device = recipe.device_of(TrainConfig(device=given.device))
    model = runs.load(given.run, model=given.model, device=device)
    recorded = recipe.read_toml(runs.find(given.run).folder / runs.CONFIG)
    name = recorded.data if given.data is None else given.data
    if not data.is_known(name):
        known = ", ".join(data.DATASETS)
        raise recipe.ConfigError(
            f"data: expected {known}, an existing folder or hf:NAME, got {name!r}"
        )
    source, notes = _source(name, recorded.data, model)
    loader = data.loader(
        source, _BATCH, shuffle=False, workers=recipe.workers(recorded), device=device
    )
    found = confusion.measure(model, loader, device)
    if given.json:
        print(json.dumps(_as_json(name, found, model.classes), ensure_ascii=False))
        return
    print("".join(f"{name}: {note}\n" for note in notes) + page(name, found, model.classes))


def _source(name: str, recorded: str, model: Classifier) -> tuple[Source, list[str]]:
    """The images to evaluate, with the model's labels and in its shape, and notes on them."""
    prepared = model.preprocessing
    if Path(name).is_dir():
        if Path(recorded).is_dir() and Path(name).samefile(recorded):
            split = folders.split(Path(name))  # a tenth may have been held out
            pairs, classes, notes = split.test, split.classes, list(split.notes)
        else:
            by_class, notes = folders.for_evaluation(Path(name))
            classes = tuple(map(folders.shown, sorted(by_class)))
            listed = enumerate(sorted(by_class))
            pairs = [(path, label) for label, key in listed for path in by_class[key]]
        labels = torch.tensor([label for _, label in pairs])
        source: Source = prepared.images([path for path, _ in pairs])
    else:
        dataset = data.load(name, image_size=prepared.shape[1], warn=False)
        source, labels, classes = dataset.test, dataset.test.labels, dataset.classes
        notes = list(dataset.notes)
    labels = _model_labels(name, labels, classes, model.classes)
    absent = [c for c in model.classes if c not in classes]
    if absent:
        notes.append(f"no images of {len(absent)} of the model's classes: {folders.few(absent)}")
    if isinstance(source, Images):  # grey or colour as the model has it, whatever these are
        return source.in_shape(prepared.shape, prepared.ranges, labels), notes
    if source.shape != prepared.shape:
        raise DataError(
            f"{name}: expected images of {'x'.join(map(str, prepared.shape))}, as the model takes "
            f"them, got {'x'.join(map(str, source.shape))}"
        )
    return Arrays(source.batch(range(len(source)))[0], labels), notes


def _model_labels(
    name: str, labels: torch.Tensor, classes: Sequence[str], own: Sequence[str]
) -> torch.Tensor:
    """Labels, indices of ``classes``, as indices of the model's classes."""
    unknown = [c for c in classes if c not in own]
    if unknown:
        raise DataError(
            f"{name}: expected classes of the model ({folders.few(own)}), got "
            f"{folders.few(unknown)}; rename or remove {'it' if len(unknown) == 1 else 'them'}"
        )
    return torch.tensor([own.index(c) for c in classes])[labels]


# ---- the results ----


def page(name: str, found: Confusion, classes: Sequence[str]) -> str:
    """The results as text."""
    correct = int(found.counts.trace())
    lines = [
        f"{name}: {found.images:,} images, {correct:,} correct",
        f"accuracy {found.accuracy:.2%}",
        "",
    ]
    width = max(len("class"), *map(len, classes))
    lines.append(f"{'class':<{width}}  images  accuracy  most often taken for")
    for label, (images, share) in enumerate(found.per_class()):
        wrong = found.counts[label].clone()
        wrong[label] = 0
        other = f"{classes[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.any() else ""
        shown = "-" if share is None else f"{share:.1%}"
        lines.append(f"{classes[label]:<{width}}  {images:>6,}  {shown:>8}  {other}".rstrip())
    return "\n".join([*lines, "", *_matrix(found, classes)])


def _matrix(found: Confusion, classes: Sequence[str]) -> list[str]:
    if len(classes) > _MOST_COLUMNS:
        pairs = found.most_confused(_PAIRS)
        lines = [f"  {classes[i]} taken for {classes[j]}: {n:,}" for i, j, n in pairs]
        return ["most confused (--json prints the whole matrix)", *lines]
    heads = [name if len(name) <= 8 else f"{name[:7]}…" for name in classes]
    rows = found.counts.tolist()
    width = max(len(f"{max(map(max, rows)):,}"), *map(len, heads))
    first = max(map(len, classes))
    lines = ["confusion matrix: a row a class, a column a prediction"]
    lines.append(f"{'':<{first}}" + "".join(f"  {head:>{width}}" for head in heads))
    for name, row in zip(classes, rows, strict=True):
        lines.append(f"{name:<{first}}" + "".join(f"  {n or '·':>{width}}" for n in row))
    return lines


def _as_json(name: str, found: Confusion, classes: Sequence[str]) -> dict[str, object]:
    per_class = {
        name: {"images": images, "accuracy": share}
        for name, (images, share) in zip(classes, found.per_class(), strict=True)
    }
    return {
        "data": name,
        "images": found.images,
        "accuracy": found.accuracy,
        "classes": per_class,
        "confusion": found.counts.tolist(),
    }
