"""Data sets: two sources of uint8 images with labels, and the statistics of their pixels.

Images stay uint8 until ``Mixup`` normalises, mixes and casts a whole batch in one pass; a batch is
one indexing operation, never a list of samples collated in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]
_LEAST_STD = 1 / 255 / 16  # what is divided by it is at most 4,080: finite in fp16
CONSTANT_STD = 1.0  # no channel of values in [0, 1] has one above 0.5


class DataError(ValueError):
    """A data set that is unknown, missing, corrupt or truncated; the message says what to do."""


class Source(Protocol):
    """uint8 images and int64 labels by index, in memory or decoded on access."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""

    def __len__(self) -> int:
        """N."""

    def batch(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, C, H, W) and labels int64 (n,).

        Args:
            indices: of the images, (n,).
            seed: of all random augmentation, such as crops: the same seed gives the same batch;
                None: no augmentation.
        """


class Arrays:
    """A source in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).

    Raises:
        ValueError: no images, or unequal numbers of images and labels.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"expected as many labels as images and at least one, got {len(images)} images "
                f"and {len(labels)} labels"
            )
        self.images = images
        self.labels = labels

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def batch(self, indices: Sequence[int], seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of these indices; ``seed`` is unused, there is no augmentation."""
        index = torch.as_tensor(indices, device="cpu").to(self.images.device, non_blocking=True)
        return self.images[index], self.labels[index]

    def to(self, device: torch.device) -> Arrays:
        """A copy on ``device``."""
        return Arrays(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Images and labels for training and testing, ``train`` and ``test``.

    ``mean`` and ``std`` are the training images' statistics per channel after scaling to [0, 1];
    ``classes`` are the names of the labels, ``name`` is the data set's name; ``notes`` say in a
    line each what was decided or passed over when it was loaded.

    Raises:
        DataError: a label that is no index of ``classes``.
    """

    name: str
    train: Source
    test: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, source in (("training", self.train), ("test", self.test)):
            wrong = source.labels[(source.labels < 0) | (source.labels >= len(self.classes))]
            if len(wrong):
                raise DataError(
                    f"{self.name}: expected labels from 0 to {len(self.classes) - 1}, got "
                    f"{int(wrong[0])} among the {part} labels ({len(wrong):,} of "
                    f"{len(source.labels):,} are out of range)"
                )

    @property
    def shape(self) -> Shape:
        """(C, H, W) of one image."""
        return self.train.shape


def histogram(images: Tensor) -> Tensor:
    """How often each level of uint8 (N, C, H, W) occurs per channel: int64 (C, 256)."""
    return torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])


def statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, scaled to [0, 1], of the levels in a ``histogram``.

    The standard deviation of a channel that is constant, or below a sixteenth of one of 255 levels,
    is given as 1: divided by it the channel is 0 where it has its mean, and small elsewhere.
    """
    shares = counts.numpy() / counts.numpy().sum(1, keepdims=True)
    levels = np.arange(256) / 255.0
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
    std[std < _LEAST_STD] = CONSTANT_STD
    return tuple(mean.tolist()), tuple(std.tolist())


def in_memory(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
) -> Dataset:
    """A data set of (images, labels) pairs."""
    statistics_ = statistics(histogram(train[0]))
    return Dataset(name, Arrays(*train), Arrays(*test), *statistics_, classes)
