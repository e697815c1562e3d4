"""Data sets of image files, a folder per class; needs the extra ``[data]``."""

from __future__ import annotations

import io
import random
import statistics as stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.data import folders, pixels
from fastmp.data.dataset import CONSTANT_STD, DataError, Dataset, Shape, histogram, statistics

if TYPE_CHECKING:
    from PIL.Image import Image

Read = Callable[[int], "tuple[Image, str]"]

MAX_DEFAULT_SIDE = 224  # pixels, without an image_size: the input of ImageNet models
_SAMPLE = 1000  # images for mean, std, default side and the range of wide values
_DARK = 32  # of 256: 12 bits of 16 a colour, whose upper 8 Pillow gives, or values of 0 and 1
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
        ranges: of values wider than 8 bits; see ``fastmp.data.pixels.measure_ranges``.
    """

    def __init__(
        self, read: Read, labels: Tensor, shape: Shape, ranges: pixels.Ranges | None = None
    ) -> None:
        self._read = read
        self.labels = labels
        self._shape = shape
        self.ranges = ranges or {}

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        return self._shape

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def in_shape(self, shape: Shape, ranges: pixels.Ranges, labels: Tensor) -> Images:
        """The same images as (C, H, W), wide values in other ranges, with labels int64 (N,)."""
        return Images(self._read, labels, shape, ranges)

    def batch(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, C, H, W) and labels int64 (n,).

        Raises:
            DataError: a file that is no image; the message has its name.
        """
        images = torch.stack([self._decoded(int(index), seed) for index in indices])
        return images, self.labels[torch.as_tensor(indices, device="cpu")]

    def _decoded(self, index: int, seed: int | None) -> Tensor:
        channels, height, width = self._shape
        image, name = _load(self._read, index)
        with Reading(name):
            image = pixels.to_8_bits(image, channels, self.ranges)
            rng = None if seed is None else random.Random(f"{seed} {index}")
            crop = _centre_square(*image.size) if rng is None else _random_crop(*image.size, rng)
            image = image.resize((width, height), 2, box=crop, reducing_gap=2.0)  # 2: bilinear
        values = torch.from_numpy(np.array(image, np.uint8)).reshape(height, width, channels)
        if rng is not None and rng.random() < 0.5:
            values = values.flip(1)
        return values.permute(2, 0, 1).contiguous()


class Reading:
    """Whatever a decoder raises (OSError, SyntaxError, struct.error, MemoryError, ...) becomes the
    error that names the file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            reason = str(error) or type(error).__name__
            if type(error).__name__ == "UnidentifiedImageError":  # its text names the file again
                reason = "a file of another kind, or a damaged one"
            raise DataError(
                f"{self._name} cannot be read: expected an image, got: {reason}; replace it or "
                "leave it out"
            ) from error


def _load(read: Read, index: int) -> tuple[Image, str]:
    """An image, decoded, and its name."""
    image, name = read(index)
    with Reading(name):
        if image.width * image.height > _MAX_PIXELS:  # from the header, before decoding
            raise OSError(f"{image.width} x {image.height} pixels, {_MAX_PIXELS} at most")
        image.load()
    return image, name


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


def dataset_of(
    name: str,
    parts: Sequence[tuple[Read, Tensor]],
    classes: Sequence[str],
    size: int | None,
    notes: Sequence[str],
) -> Dataset:
    """The data set of (read, labels int64 (N,)) for training and for testing.

    Args:
        name: of the data set.
        parts: index to the opened image and its name in messages, and labels.
        classes: names of the labels.
        size: height and width; None: see ``fastmp.data.load``.
        notes: what the user should know, a line each; more are added.

    Raises:
        DataError: an image that cannot be read, a label out of range.
    """
    (read, labels), (read_test, test_labels) = parts
    sample, test_sample = _sample(labels), _sample(test_labels)
    headers = list(_headers(read, sample))
    side = MAX_DEFAULT_SIDE
    side = min(side, stat.median_low(h.side for h in headers)) if size is None else size
    everything = chain(  # one colour image ends it: the sample first
        headers, _headers(read, range(len(labels))), _headers(read_test, range(len(test_labels)))
    )
    shape = (1 if all(header.channels == 1 for header in everything) else 3, side, side)
    ranges = _ranges(read, sample)
    train = Images(read, labels, shape, ranges)
    test = Images(read_test, test_labels, shape, ranges)
    counts = sum(histogram(train.batch([index])[0]) for index in sample)  # one in memory at a time
    assert isinstance(counts, Tensor)
    mean, std = statistics(counts)
    notes = [*notes, *_decided(train, test, classes, ranges, std)]
    notes += _other_scale(ranges, _ranges(read_test, test_sample))
    top = int(counts.sum(0).nonzero().max())
    if top < _DARK:
        notes.append(
            f"dark: no pixel of {len(sample):,} training images is above {top} of 255; "
            "were they saved with fewer bits than their format has?"
        )
    return Dataset(name, train, test, mean, std, tuple(classes), tuple(notes))


def _sample(labels: Tensor) -> range:
    return range(0, len(labels), -(-len(labels) // _SAMPLE))


def _ranges(read: Read, sample: range) -> pixels.Ranges:
    """Of the wide values in these images."""
    wide = (
        index for index, header in zip(sample, _headers(read, sample), strict=True) if header.wide
    )
    return pixels.measure_ranges(_load(read, index)[0] for index in wide)


def _other_scale(train: pixels.Ranges, test: pixels.Ranges) -> Iterator[str]:
    """A line for wide values that reach twice as far in one part as in the other."""
    for kind in train.keys() & test.keys():
        (low, high), (test_low, test_high) = train[kind], test[kind]
        spans = high - low, test_high - test_low
        if max(spans) >= 2 * min(spans):
            yield (
                f"validation images reach from {test_low:g} to {test_high:g} where training images "
                f"reach from {low:g} to {high:g}, and are scaled as those: are both of one kind?"
            )


class _Header(NamedTuple):
    channels: int
    side: int  # the shorter one
    wide: bool


def _headers(read: Read, indices: Iterable[int]) -> Iterator[_Header]:
    """What the headers say, without decoding."""
    for index in indices:
        image, name = read(index)
        with Reading(name), image:
            wide = pixels.wide_kind(image.mode) is not None
            header = _Header(pixels.channels(image), min(image.size), wide)
        yield header


def _decided(
    train: Images,
    test: Images,
    classes: Sequence[str],
    ranges: pixels.Ranges,
    std: Sequence[float],
) -> Iterator[str]:
    """What the data made of the settings, a line each."""
    for part, source in (("training", train), ("validation", test)):
        present = set(source.labels.tolist())
        absent = [name for label, name in enumerate(classes) if label not in present]
        if absent:
            yield f"{len(absent)} of {len(classes)} classes have no {part} images: " + folders.few(
                absent
            )
    for kind, (low, high) in ranges.items():
        what = "floats" if kind == "F" else "integers of more than 8 bits"
        yield f"pixels that are {what}: {low:g} to {high:g} becomes 0 to 255"
    constant = [str(channel) for channel, value in enumerate(std) if value == CONSTANT_STD]
    if constant:
        yield f"constant over the training images: channel {', '.join(constant)}; std taken as 1"


class Files:
    """Opens files by index; a class, so that worker processes can unpickle it.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __call__(self, index: int) -> tuple[Image, str]:
        """The image with its header read, and its name in messages."""
        path = self._paths[index]
        name = folders.shown(path)
        return opened(path, name), name


def opened(file: str | io.BytesIO, name: str) -> Image:
    """An image with its header read; ``name`` for messages."""
    with Reading(name):
        image: Image = pillow().open(file, formats=folders.formats())
    # Without a name the file is not mapped into memory. Pillow 13 maps a TIFF of EXIF orientation 5
    # to 8 with its sides exchanged: the pixels are scrambled.
    image.filename = ""  # type: ignore[attr-defined]
    return image


def from_folder(folder: Path, size: int | None) -> Dataset:
    """The images below ``folder``; see ``fastmp.data.load``.

    Raises:
        DataError: no images, fewer than two classes, or a test class without training images.
    """
    pillow()
    found = folders.split(folder)
    parts = [
        (
            Files([path for path, _ in pairs]),
            torch.tensor([y for _, y in pairs], dtype=torch.int64, device="cpu"),
        )
        for pairs in (found.train, found.test)
    ]
    return dataset_of(folders.shown(folder), parts, found.classes, size, found.notes)


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        DataError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "image files need pillow; install it with: pip install 'fastmp[data]'"
        ) from error
    return Image
