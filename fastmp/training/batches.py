"""Batches of other people's loaders as (images, labels)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Pair = tuple[Tensor, Tensor]
Prepare = Callable[[Any], Pair]

# the names that torchvision, Hugging Face, timm and Keras use, the common ones first
INPUTS = ("images", "image", "pixel_values", "inputs", "input", "x")
TARGETS = ("labels", "label", "targets", "target", "y")


def as_pair(batch: Any) -> Pair:
    """(images, labels) of a batch that is a pair of them, or a dictionary with both.

    Raises:
        TypeError: anything else; the message says what it is.
    """
    if isinstance(batch, Mapping):
        found = [next((n for n in names if n in batch), None) for names in (INPUTS, TARGETS)]
        if None not in found:
            return batch[found[0]], batch[found[1]]
        got = f"a dictionary with {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        if len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            return batch[0], batch[1]
        got = f"({', '.join(type(part).__name__ for part in batch)})"
    else:
        got = type(batch).__name__
    raise TypeError(
        f"a batch must be (images, labels), or a dictionary with {INPUTS[0]!r} and {TARGETS[0]!r} "
        f"or other common names, got {got}; prepare_batch=function makes a pair of it"
    )
