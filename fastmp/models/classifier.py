"""A trained network with its classes and its preprocessing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmp.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

_BATCH = 64  # images that are decoded and predicted at a time


class Prediction(NamedTuple):
    """A class by name, and its probability in [0, 1]."""

    name: str
    probability: float


class Classifier(nn.Module):
    """Maps images (N, C, H, W) to logits (N, classes), the normalisation included.

    Images are uint8 from 0 to 255, or floating in [0, 1].

    Args:
        network: of normalised images.
        classes: names of its outputs.
        preprocessing: of the run.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, classes: Sequence[str], preprocessing: Preprocessing
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).reshape(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes), in the dtype of the weights."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        normalised = (images - self.mean) / self.std
        dtype = next(self.network.parameters()).dtype
        logits: Tensor = self.network(normalised.to(dtype))
        return logits

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def preprocess(self, image: str | os.PathLike[str] | Image | NDArray[np.uint8]) -> Tensor:
        """Pixels fp32 (C, H, W) in [0, 1] of a file, a Pillow image or an array (H, W[, 3]) uint8.

        The centre square, resized, as in the validation of the run.

        Raises:
            DataError: no such file, or no image.
        """
        return self.preprocessing(image).float() / 255

    @torch.no_grad()
    def predict(self, images: Any, top: int = 1) -> list[list[Prediction]]:
        """The most probable classes of each image, the first one first.

        Args:
            images: one as ``preprocess`` takes it, or a sequence of them.
            top: number of classes, at most all.

        Raises:
            DataError: an image that cannot be read; the message names it.
        """
        several = images if isinstance(images, list | tuple) else [images]
        source = self.preprocessing.images(list(several))
        found: list[list[Prediction]] = []
        for start in range(0, len(several), _BATCH):
            indices = range(start, min(start + _BATCH, len(several)))
            found += self.top(source.batch(indices)[0], top)
        return found

    @torch.no_grad()
    def top(self, images: Tensor, top: int = 1) -> Iterator[list[Prediction]]:
        """The most probable classes of each image of a batch (N, C, H, W), uint8 or floating."""
        shares = self(images.to(self.device)).float().softmax(1)
        shares, labels = (t.tolist() for t in shares.topk(min(top, len(self.classes))))
        for row, names in zip(shares, labels, strict=True):
            pairs = zip(names, row, strict=True)
            yield [Prediction(self.classes[label], share) for label, share in pairs]
