"""Data sets of uint8 images, by name, from folders or from Hugging Face, and their loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastmp.data import files
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
    return name in DATASETS or name.startswith(_HUB) or Path(name).is_dir()


def load(name: str, *, image_size: int | None = None) -> Dataset:
    """A data set.

    Args:
        name: one of ``DATASETS``; a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or with
            CLASS/IMAGE, where every tenth image of a class goes to the test split; or hf:NAME,
            also hf:NAME:CONFIG or hf:FOLDER, for Hugging Face ``datasets``.
        image_size: height and width to crop and resize image files to; None: the shorter side of
            the first image, at most 224.

    Raises:
        DataError: an unknown name; files that are missing, corrupt or cannot be downloaded.
    """
    if name in DATASETS:
        return DATASETS[name]()
    if name.startswith(_HUB):
        return files.from_hugging_face(name.removeprefix(_HUB), image_size)
    if Path(name).is_dir():
        return files.from_folder(Path(name), image_size)
    raise DataError(
        f"unknown data set {name!r}; expected {', '.join(DATASETS)}, a folder of images with one "
        "subfolder per class, or hf:NAME"
    )
