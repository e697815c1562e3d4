"""Hugging Face data sets, from the hub or the disk; needs the extra ``[data]``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmp.data.dataset import DataError, Dataset
from fastmp.data.files import Reading, dataset_of, opened, pillow

if TYPE_CHECKING:
    from PIL.Image import Image


class _Rows:
    """Opens the images of a column by index."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        from datasets import Image

        self._rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self._column, self._name = column, name

    def __call__(self, index: int) -> tuple[Image, str]:
        from datasets import Image

        name = f"image {index} of {self._name}"
        with Reading(name):
            value = self._rows[index][self._column]
            if value is None:
                raise OSError("nothing")
            if value["bytes"] is not None:
                return opened(io.BytesIO(value["bytes"]), name), name
            if Path(value["path"]).is_file():
                return opened(value["path"], name), name
            return Image().decode_example(value), name  # in an archive or on the hub


def from_hugging_face(name: str, size: int | None) -> Dataset:
    """A data set on the Hugging Face hub or in a folder; see ``fastmp.data.load``.

    Raises:
        DataError: it cannot be loaded, or has no column of images or of class labels, or labels
            out of range.
    """
    pillow()
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"hf:{name} needs the package datasets; install it with: pip install 'fastmp[data]'"
        ) from error
    path, _, config = name.partition(":")
    try:
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config or None)
    except Exception as error:  # datasets has no base class for its errors
        raise DataError(f"hf:{name} cannot be loaded: {error}") from error
    if not hasattr(found, "keys"):
        found = {"train": found}
    if "train" not in found:
        raise DataError(f"hf:{name}: expected a split 'train', got {', '.join(found)}")
    features = found["train"].features
    kinds = {column: type(kind).__name__ for column, kind in features.items()}
    columns = {kind: column for column, kind in reversed(kinds.items())}
    if not {"Image", "ClassLabel"} <= columns.keys():
        raise DataError(
            f"hf:{name}: expected a column of type Image and one of type ClassLabel, got {kinds}"
        )
    image, label = columns["Image"], columns["ClassLabel"]
    classes = features[label].names
    if len(classes) < 2:
        raise DataError(f"hf:{name}: expected at least 2 classes, got {classes}")
    train, test, notes = _splits(found, label)
    parts = [(_Rows(rows, image, f"hf:{name}"), _labels(rows, label)) for rows in (train, test)]
    return dataset_of(f"hf:{name}", parts, classes, size, notes)


def _labels(rows: Any, column: str) -> Tensor:
    """int64 (N,); -1 where there is none."""
    labels = [-1 if label is None else label for label in rows[column]]
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def _splits(found: Any, label: str) -> tuple[Any, Any, list[str]]:
    """The training and the test split; without a labelled test split a fixed tenth of training."""
    notes: list[str] = []
    for split in ("validation", "test", "val", "valid"):
        if split in found:
            if label in found[split].column_names and (_labels(found[split], label) >= 0).any():
                return found["train"], found[split], notes
            notes.append(f"the split {split!r} has no labels and is not used")
    parts = found["train"].train_test_split(test_size=0.1, seed=0)
    train, test = parts["train"], parts["test"]
    held = f"{len(test):,} of {len(train) + len(test):,}"
    notes.append(
        f"no split for validation: a tenth of the training split, drawn with seed 0, is held out "
        f"for it, {held}"
    )
    return train, test, notes
