"""From an image to the input of a trained model, as in the validation of its run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmp.data.dataset import DataError, Dataset, Shape
from fastmp.data.files import Files, Images, pillow
from fastmp.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "preprocessing.json"  # its name in a run folder


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into pixels: the centre square, resized, upright, transparency on white.

    Args:
        shape: (C, H, W) of the result.
        mean, std: per channel of the training images scaled to [0, 1].
        ranges: of values wider than 8 bits; see ``fastmp.data.pixels.measure_ranges``.
    """

    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> Preprocessing:
        """That of a data set's validation."""
        ranges = dataset.train.ranges if isinstance(dataset.train, Images) else {}
        return cls(dataset.shape, dataset.mean, dataset.std, ranges)

    def __call__(self, image: str | os.PathLike[str] | Image | NDArray[np.uint8]) -> Tensor:
        """Pixels uint8 (C, H, W) of a file, of a Pillow image, or of an array (H, W) or (H, W, 3).

        Raises:
            DataError: no such file, or no image.
        """
        return self.images([image]).batch([0])[0][0]

    def images(self, images: list[Any], labels: Tensor | None = None) -> Images:
        """A source of these images, each as ``__call__`` takes it, with labels int64 (N,)."""
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.int64, device="cpu")
        return Images(_Opened(images), labels, self.shape, self.ranges)

    def write(self, folder: Path) -> None:
        """Write ``preprocessing.json`` into the folder of a run."""
        atomic_write(folder / FILE, json.dumps(asdict(self), indent=1).encode())


def read(path: Path) -> Preprocessing:
    """What ``Preprocessing.write`` wrote.

    Raises:
        ValueError: it is damaged.
    """
    content = json.loads(path.read_bytes())
    try:
        channels, height, width = map(int, content["shape"])
        mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
        ranges = {
            kind: (float(low), float(high)) for kind, (low, high) in content["ranges"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"expected shape, mean, std and ranges, got {content!r:.60}") from error
    return Preprocessing((channels, height, width), mean, std, ranges)


class _Opened:
    """Opens images by index; a class, so that worker processes can unpickle it."""

    def __init__(self, images: list[Any]) -> None:
        self._images = images

    def __call__(self, index: int) -> tuple[Image, str]:
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            if not Path(image).exists():
                raise DataError(f"{os.fspath(image)} does not exist")
            return Files([os.fspath(image)])(0)
        if isinstance(image, np.ndarray):
            image = pillow().fromarray(image)
        return image, f"image {index}"
