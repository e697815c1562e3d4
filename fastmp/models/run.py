"""The model that a run has trained, from the files in its folder.

model.safetensors     weights fp32, under the names of the model; written when the run has ended
classes.json          names of the outputs
preprocessing.json    shape, mean and std of the input
config.toml           the recipe, which names the model
checkpoints/          the state; while a run is unfinished, the weights are taken from here
"""

from __future__ import annotations

import json
import os
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmp import checkpoint, files
from fastmp.checkpoint import weights
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data import Dataset, preprocessing
from fastmp.data.preprocessing import Preprocessing
from fastmp.models.builtin import ModelError, Shape, build
from fastmp.models.classifier import Classifier

CONFIG = "config.toml"
CLASSES = "classes.json"


class RunError(ValueError):
    """A folder that is no run, or a run that cannot be used: what is missing, and what adds it."""


@dataclass(frozen=True)
class Run:
    """A run's folder; ``checkpoint`` is one of it to take the weights from, None: its last ones."""

    folder: Path
    checkpoint: Path | None = None

    def config(self) -> dict[str, Any]:
        """The values of its ``config.toml``, not checked."""
        with self._read(CONFIG):
            return tomllib.loads((self.folder / CONFIG).read_text(encoding="utf-8"))

    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs."""
        with self._read(CLASSES):
            names = json.loads((self.folder / CLASSES).read_bytes())
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"expected a list of names, got {names!r:.60}")
            return tuple(names)

    def preprocessing(self) -> Preprocessing:
        """The preprocessing of its images."""
        with self._read(preprocessing.FILE):
            return preprocessing.read(self.folder / preprocessing.FILE)

    def weights(self) -> dict[str, Tensor]:
        """The weights in fp32, by the names of the model.

        Raises:
            RunError: no epoch was finished, or the file is damaged.
            CheckpointError: a checkpoint is damaged.
        """
        path = self.folder / weights.FILE
        if self.checkpoint is None and path.exists():
            with self._read(weights.FILE):
                return load_file(path)
        if self.checkpoint is not None:
            return weights.fp32_weights(checkpoint.load(self.checkpoint))
        state = Checkpoints(self.folder / "checkpoints").load_newest()
        if state is None:
            raise RunError(
                f"{self.folder} has no weights yet: it stopped before its first checkpoint; "
                f"fastmp train --resume --out {self.folder} goes on with it"
            )
        step, epoch = state["progress"]["step"], state["progress"]["epoch"]
        epochs = self.config().get("epochs", epoch)
        if epoch < epochs:
            warnings.warn(
                f"{self.folder} is unfinished: the weights are those after step {step}, with "
                f"{epoch} of {epochs} epochs done; fastmp train --resume --out {self.folder} goes "
                "on with it",
                stacklevel=3,
            )
        return weights.fp32_weights(state)

    def _read(self, name: str) -> _Reading:
        return _Reading(self.folder, name)


class _Reading:
    """Errors in the block are about this file of a run."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        path, again = self._folder / self._name, f"fastmp train --resume --out {self._folder}"
        if isinstance(error, FileNotFoundError):
            raise RunError(
                f"{self._folder} has no {self._name}: it is of an earlier version of fastmp; "
                f"{again} adds it"
            ) from error
        if isinstance(error, ValueError | OSError | SafetensorError):
            raise RunError(f"{path} is damaged: {error}; {again} writes it again") from error


def find(path: str | os.PathLike[str]) -> Run:
    """The run in a folder, or that of a checkpoint.

    Args:
        path: a run's folder, its ``checkpoints``, one of these, or a file in it.

    Raises:
        RunError: there is none; the message says what there is.
    """
    given = Path(path)
    if not given.exists():
        raise RunError(f"{given} does not exist; expected the folder of a run")
    folder = given if given.is_dir() else given.absolute().parent
    if (folder / checkpoint.MANIFEST).is_file() and (folder.parent.parent / CONFIG).is_file():
        return Run(folder.parent.parent, folder)
    if folder.name == "checkpoints":
        folder = folder.parent
    if (folder / CONFIG).is_file():
        return Run(folder)
    if (folder / weights.FILE).is_file() or (folder / "checkpoints").is_dir():
        raise RunError(
            f"{folder} is a run of fastmp.Trainer in Python, which does not say how its model is "
            f"built: fastmp.transfer.load_pretrained(model, {str(folder)!r}) loads its weights"
        )
    runs = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
    inside = f"; it holds the runs {', '.join(runs[-3:])}" if runs else ""
    raise RunError(
        f"{given} is no run: expected a folder with {CONFIG}, as fastmp train leaves it{inside}"
    )


Factory = Callable[[Shape, int], nn.Module]


def load(
    run: str | os.PathLike[str],
    *,
    model: nn.Module | Factory | str | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """The model that a run of ``fastmp train`` has trained, in fp32 and in eval mode.

        model = fastmp.load("runs/pets")
        model.predict("cat.jpg")                    # [[Prediction(name='cat', probability=0.97)]]
        model(torch.stack([model.preprocess(path) for path in paths]))     # logits (N, classes)

    Args:
        run: its folder, or one of its checkpoints.
        model: what the run trained, where its ``package.module:factory`` is elsewhere now: a module
            with this architecture, whose weights are replaced, a factory, or its name.
        device: of the result.

    Returns:
        a module from images (N, C, H, W), uint8 or floating in [0, 1], to logits fp32 (N, classes),
        with ``classes``, ``preprocess`` and ``predict``.

    Raises:
        RunError: no run, one without weights or with a damaged file, or weights of another model.
        CheckpointError: its checkpoints are damaged.
        ModelError: the run's model cannot be built.
    """
    found = find(run)
    classes, prepared = found.classes(), found.preprocessing()
    network = _network(found, model, prepared.shape, len(classes))
    saved = found.weights()
    _refuse_other(found, network, saved)
    network.load_state_dict(saved)
    return Classifier(network, classes, prepared).to(device).eval()


def _network(
    run: Run, model: nn.Module | Factory | str | None, shape: Shape, classes: int
) -> nn.Module:
    if isinstance(model, nn.Module):
        return model.float()
    if model is not None and not isinstance(model, str):
        return model(shape, classes)
    name = run.config().get("model") if model is None else model
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and replaced
        try:
            return build(str(name), shape, classes)
        except ModelError as error:
            error.add_note(
                f"{run.folder} was trained with it: say where it is now with --model, or in Python "
                "fastmp.load(run, model=...)"
            )
            raise


def _refuse_other(run: Run, network: nn.Module, saved: dict[str, Tensor]) -> None:
    own = network.state_dict()
    for name in own | saved:
        here, there = (str(tuple(s[name].shape)) if name in s else "missing" for s in (own, saved))
        if here != there:
            raise RunError(
                f"{run.folder} has the weights of another model: {name} is {there} in the run and "
                f"{here} in the model; build it as the run had it"
            )


def write_about(folder: Path, dataset: Dataset) -> None:
    """Write ``classes.json`` and ``preprocessing.json`` of a run's data set into its folder."""
    listed = json.dumps(list(dataset.classes), indent=0, ensure_ascii=False)
    files.atomic_write(folder / CLASSES, listed.encode())
    Preprocessing.of(dataset).write(folder)
