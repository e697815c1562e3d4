"""``fastmp predict``: the classes of pictures, by the model that a run has trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from fastmp import recipe
from fastmp.data import DataError, folders
from fastmp.models import run as runs
from fastmp.models.classifier import Classifier, Prediction
from fastmp.recipe import TrainConfig
from fastmp.recipe.config import COUNT, shown_default

_BATCH = 64


@dataclass(frozen=True)
class Predict:
    """Print the class of each picture and its probability, a line each."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run of fastmp train, or one of its checkpoints."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Pictures, or folders of pictures."""

    top: int = 1
    """Most probable classes to print."""

    json: bool = False
    """Print a JSON object a line."""

    model: Annotated[str | None, shown_default("NAME", "as in the run")] = None
    """package.module:factory of the model, where it is not where the run had it."""

    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto: cuda if there is one."""


def main(arguments: Sequence[str]) -> None:
    """Print the class of each picture, by the model of a run."""
    run(tyro.cli(Predict, prog="fastmp predict", args=arguments))


def run(given: Predict) -> None:
    """Print a line a picture; those that cannot be read are named on stderr.

    Raises:
        ConfigError: an argument out of its range, or no picture.
        DataError: pictures that cannot be read; the others are printed.
        RunError, CheckpointError, ModelError: as ``fastmp.load``.
    """
    COUNT.check("top", given.top)
    if not given.images:
        raise recipe.ConfigError("images: expected at least one picture, got none")
    device = recipe.device_of(TrainConfig(device=given.device))
    model = runs.load(given.run, model=given.model, device=device)
    paths = [path for image in given.images for path in _expanded(image)]
    width = max(len(folders.shown(path)) for path in paths)
    failed: list[DataError] = []
    for start in range(0, len(paths), _BATCH):
        decoded, errors = _decoded(model, paths[start : start + _BATCH])
        for path, found in _predicted(model, decoded, given.top):
            print(_as_json(path, found) if given.json else _line(path, found, width))
        failed += errors
    if len(failed) == len(paths) == 1:
        raise failed[0]
    if failed:
        for error in failed:
            print(f"fastmp predict: {error}", file=sys.stderr)
        raise DataError(f"{len(failed)} of {len(paths)} pictures could not be read")


def _expanded(image: Path) -> list[str]:
    return folders.images_in(image) if image.is_dir() else [str(image)]


def _decoded(
    model: Classifier, paths: Sequence[str]
) -> tuple[list[tuple[str, Tensor]], list[DataError]]:
    """The pixels of each picture, uint8 (C, H, W), and the errors of those that are none."""
    decoded, errors = [], []
    for path in paths:
        try:
            decoded.append((path, model.preprocessing(path)))
        except DataError as error:
            errors.append(error)
    return decoded, errors


def _predicted(
    model: Classifier, decoded: Sequence[tuple[str, Tensor]], top: int
) -> Iterator[tuple[str, list[Prediction]]]:
    if decoded:
        batch = torch.stack([pixels for _, pixels in decoded])
        yield from zip((path for path, _ in decoded), model.top(batch, top), strict=True)


def _line(path: str, found: Sequence[Prediction], width: int) -> str:
    classes = "  ".join(f"{name} {share:.1%}" for name, share in found)
    return f"{folders.shown(path):<{width}}  {classes}"


def _as_json(path: str, found: Sequence[Prediction]) -> str:
    listed = [{"class": name, "probability": share} for name, share in found]
    row = {"image": folders.shown(path), **listed[0]}
    return json.dumps(row if len(listed) == 1 else {**row, "top": listed}, ensure_ascii=False)
