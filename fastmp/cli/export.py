"""``fastmp export``: a run's model as one file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmp import recipe
from fastmp.models import export as exports
from fastmp.models import run as runs
from fastmp.models.export import FILES, Format
from fastmp.recipe.config import shown_default


@dataclass(frozen=True)
class Export:
    """Write a run's model as one file, and check it against the model."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run of fastmp train, or one of its checkpoints."""

    format: Format
    """safetensors: the weights. onnx, torch.export: from pixels in [0, 1] to logits."""

    out: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: RUN/export/model.*)"),
    ] = None
    """Where it goes."""

    model: Annotated[str | None, shown_default("NAME", "as in the run")] = None
    """package.module:factory of the model, where it is not where the run had it."""


def main(arguments: Sequence[str]) -> None:
    """A run's model as safetensors, ONNX or torch.export, checked against the model."""
    run(tyro.cli(Export, prog="fastmp export", args=arguments))


def run(given: Export) -> None:
    """Write the file.

    Raises:
        ConfigError: nothing can be written there.
        ExportError: it could not be made, or computes something else than the model.
        RunError, CheckpointError, ModelError: as ``fastmp.load``.
    """
    model = runs.load(given.run, model=given.model)
    path = given.out
    if path is None:
        path = runs.find(given.run).folder / "export" / FILES[given.format]
    recipe.make_folder("out", path.parent)
    difference = exports.export(model, given.format, path)
    shape = ", ".join(["N", *map(str, model.preprocessing.shape)])
    size = f"{path.stat().st_size / 2**20:.1f} MiB"
    if difference is None:
        print(f"{path}: {size}, fp32 weights; classes, mean and std are in its metadata")
        return
    print(
        f"{path}: {size}, from images ({shape}) in [0, 1] to logits (N, {len(model.classes)})\n"
        f"checked: its logits differ from the model's by {difference:.0e} of the largest"
    )
