"""Image files, a folder per class, and Hugging Face data sets; needs the extra ``[data]``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastmp.data.dataset import DataError, Dataset, Shape, statistics

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_DEFAULT_SIDE = 224  # pixels, without an image_size: the input of ImageNet models
_SAMPLE = 1000  # images for mean and std
_MAX_PIXELS = 10**8  # of an image, 300 MB decoded: a small file may decode to any size
_CROP_AREA = (0.08, 1.0)  # of the image (Szegedy et al. 2015, 1409.4842)
_CROP_RATIO = (3 / 4, 4 / 3)  # width : height


class Images:
    """A source that decodes images on access.

    In training a random crop, flipped with probability 1/2, drawn from (seed, index); in evaluation
    the largest centre square.

    Args:
        read: index to the opened image and its name in messages.
        labels: int64 (N,).
        shape: (C, H, W) of the result; C is 1 or 3.
    """

    def __init__(
        self, read: Callable[[int], tuple[Image, str]], labels: Tensor, shape: Shape
    ) -> None:
        self._read = read
        self.labels = labels
        self._shape = shape

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        return self._shape

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def batch(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, C, H, W) and labels int64 (n,).

        Raises:
            DataError: a file that is no image; the message has its name.
        """
        images = torch.stack([self._decoded(int(index), seed) for index in indices])
        return images, self.labels[torch.as_tensor(indices)]

    def _decoded(self, index: int, seed: int | None) -> Tensor:
        channels, height, width = self._shape
        name = f"image {index}"
        try:
            image, name = self._read(index)
            if image.width * image.height > _MAX_PIXELS:  # from the header, before decoding
                raise OSError(f"{image.width} x {image.height} pixels, {_MAX_PIXELS} at most")
            image = image.convert("L" if channels == 1 else "RGB")
            rng = None if seed is None else random.Random(f"{seed} {index}")
            box = _centre_square(*image.size) if rng is None else _random_crop(*image.size, rng)
            image = image.resize((width, height), 2, box=box, reducing_gap=2.0)  # 2: bilinear
        except OSError as error:
            raise DataError(
                f"{name} cannot be read: expected an image, got: {error}; replace or delete it"
            ) from error
        pixels = torch.from_numpy(np.array(image, np.uint8)).reshape(height, width, channels)
        if rng is not None and rng.random() < 0.5:
            pixels = pixels.flip(1)
        return pixels.permute(2, 0, 1).contiguous()


def _centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_crop(width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * rng.uniform(*_CROP_AREA)
        ratio = np.exp(rng.uniform(*np.log(_CROP_RATIO)))
        crop_w, crop_h = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if crop_w <= width and crop_h <= height:
            left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
            return left, top, left + crop_w, top + crop_h
    return _centre_square(width, height)


def _dataset(
    name: str,
    parts: Sequence[tuple[Callable[[int], tuple[Image, str]], list[int]]],
    classes: Sequence[str],
    size: int | None,
) -> Dataset:
    (read, labels), (read_test, test_labels) = parts
    try:
        first, _ = read(0)
    except OSError as error:
        raise DataError(f"the first image of {name} cannot be read: {error}") from error
    side = min(MAX_DEFAULT_SIDE, *first.size) if size is None else size
    shape = (1 if first.mode in ("1", "L") else 3, side, side)
    train = Images(read, torch.tensor(labels), shape)
    test = Images(read_test, torch.tensor(test_labels), shape)
    step = -(-len(train) // _SAMPLE)
    mean, std = statistics(train.batch(range(0, len(train), step))[0])
    return Dataset(name, train, test, mean, std, tuple(classes))


# ---- a folder ----


class _Files:
    """Opens files by index; a class, so that worker processes can unpickle it."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __call__(self, index: int) -> tuple[Image, str]:
        image = _pillow()
        path = self._paths[index]
        try:
            return image.open(path), str(path)
        except (OSError, image.DecompressionBombError) as error:
            raise DataError(
                f"{path} cannot be read: expected an image, got: {error}; replace or delete it"
            ) from error


def from_folder(folder: Path, size: int | None) -> Dataset:
    """The images below ``folder``; see ``fastmp.data.load``.

    Raises:
        DataError: no images, or a test class without training images.
    """
    _pillow()
    train = folder / "train"
    tests = [folder / name for name in ("val", "valid", "validation", "test")]
    test = next((path for path in tests if path.is_dir()), None)
    if train.is_dir() and test is not None:
        found, found_test = _by_class(train), _by_class(test)
    else:
        whole = _by_class(train if train.is_dir() else folder)
        found = {name: [p for i, p in enumerate(paths) if i % 10] for name, paths in whole.items()}
        found_test = {name: paths[::10] for name, paths in whole.items()}
    classes = sorted(found)
    unknown = sorted(found_test.keys() - found.keys())
    if unknown:
        raise DataError(
            f"{test} has classes without images in {train}: {', '.join(unknown)}; "
            "the folders must have the same names"
        )
    parts = []
    for images in (found, found_test):
        pairs = [(path, label) for label, c in enumerate(classes) for path in images.get(c, [])]
        if not pairs:
            raise DataError(f"{folder}: expected images for training and for testing, got too few")
        parts.append((_Files([path for path, _ in pairs]), [label for _, label in pairs]))
    return _dataset(str(folder), parts, classes, size)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """The images below each subfolder of ``folder``, sorted by name."""
    found = {
        path.name: sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
        for path in folder.iterdir()
        if path.is_dir()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise DataError(
            f"{folder}: expected one subfolder per class with images ({', '.join(ENDINGS)}), "
            "found none"
        )
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "image files need pillow; install it with: pip install 'fastmp[data]'"
        ) from error
    return Image


# ---- Hugging Face ----


class _Rows:
    """Opens the images of a column by index."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        self._rows, self._column, self._name = rows, column, name

    def __call__(self, index: int) -> tuple[Image, str]:
        return self._rows[index][self._column], f"image {index} of {self._name}"


def from_hugging_face(name: str, size: int | None) -> Dataset:
    """A data set on the Hugging Face hub or in a folder; see ``fastmp.data.load``.

    Raises:
        DataError: it cannot be loaded, or has no column of images or of class labels.
    """
    _pillow()
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
    train, test = _splits(found, name)
    kinds = {column: type(kind).__name__ for column, kind in train.features.items()}
    columns = {kind: column for column, kind in reversed(kinds.items())}
    if not {"Image", "ClassLabel"} <= columns.keys():
        raise DataError(
            f"hf:{name}: expected a column of type Image and one of type ClassLabel, got {kinds}"
        )
    image, label = columns["Image"], columns["ClassLabel"]
    parts = [(_Rows(rows, image, f"hf:{name}"), list(rows[label])) for rows in (train, test)]
    return _dataset(f"hf:{name}", parts, train.features[label].names, size)


def _splits(found: Any, name: str) -> tuple[Any, Any]:
    """The training and the test split; without a test split a fixed tenth of the training split."""
    if not hasattr(found, "keys"):
        found = {"train": found}
    if "train" not in found:
        raise DataError(f"hf:{name}: expected a split 'train', got {', '.join(found)}")
    for split in ("validation", "test", "val", "valid"):
        if split in found:
            return found["train"], found[split]
    parts = found["train"].train_test_split(test_size=0.1, seed=0)
    return parts["train"], parts["test"]
