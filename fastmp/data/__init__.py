"""Data sets of uint8 images, by name, from folders or from Hugging Face, and their loaders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from fastmp.data import files, hugging_face
from fastmp.data.dataset import Arrays, DataError, Dataset, Source
from fastmp.data.digits import digits
from fastmp.data.fashion import fashion_mnist, read_idx
from fastmp.data.loader import Loader, loader
from fastmp.data.mixup import Mixup
from fastmp.ops.loss import MixedTarget

__all__ = [
    "DATASETS",
    "Arrays",
    "DataError",
    "Dataset",
    "Loader",
    "MixedTarget",
    "Mixup",
    "Source",
    "is_known",
    "load",
    "loader",
    "read_idx",
]

#: Built-in data sets by name.
DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits, "fashion-mnist": fashion_mnist}
_HUB = "hf:"


def is_known(name: str) -> bool:
    """Whether ``name`` is a built-in data set, a Hugging Face name or an existing folder."""
    if name.startswith(_HUB):
        return name != _HUB
    return name in DATASETS or (name != "" and Path(name).is_dir())  # Path("") is this folder


def load(name: str, *, image_size: int | None = None, warn: bool = True) -> Dataset:
    """A data set.

    Images are grey if every file is grey by its header. They are turned upright as EXIF says;
    transparency becomes white; values of 16 or 32 bits and floats are scaled to 0 to 255 by the
    range of the training images (``fastmp.data.pixels.measure_ranges``).

    Args:
        name: one of ``DATASETS``; a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or with
            CLASS/IMAGE, where every tenth image of a class goes to the test split; or hf:NAME,
            also hf:NAME:CONFIG or hf:FOLDER, for Hugging Face ``datasets``. In folders links are
            followed; hidden entries and files that Pillow does not open are passed over.
        image_size: height and width to crop and resize image files to; None: the median of the
            shorter sides of (at most 1,000) training images, at most 224.
        warn: also give the ``notes`` of the result as warnings.

    Raises:
        DataError: an unknown name; files that are missing, corrupt or cannot be downloaded.
    """
    dataset = _load(name, image_size)
    for note in dataset.notes if warn else ():
        warnings.warn(f"{dataset.name}: {note}", stacklevel=2)
    return dataset


def _load(name: str, image_size: int | None) -> Dataset:
    if name in DATASETS:
        return DATASETS[name]()
    if name.startswith(_HUB):
        return hugging_face.from_hugging_face(name.removeprefix(_HUB), image_size)
    if Path(name).is_dir():
        return files.from_folder(Path(name), image_size)
    raise DataError(
        f"unknown data set {name!r}; expected {', '.join(DATASETS)}, a folder of images with one "
        "subfolder per class, or hf:NAME"
    )
