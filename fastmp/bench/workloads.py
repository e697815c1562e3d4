"""The work of a training step: a model, a batch, and the loss as fastmp and as PyTorch write it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmp
from fastmp.bench.third_party import SMOOTHING
from fastmp.models import Shape

LAM = 0.7
MEAN, STD = 0.3, 0.35
Inputs = tuple[Tensor, ...]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """A model and its batches.

    Attributes:
        name: of the model.
        make: the model, in fp32.
        batch: samples of a step.
        own_mode: how fastmp trains it on a GPU: eager, compiled or graphed.
        goals: on a GPU, the least ratio to a candidate whose name starts like this.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: int
    own_mode: str = "eager"
    goals: dict[str, float] = field(default_factory=dict)

    @property
    @abstractmethod
    def label(self) -> str:
        """The batch, as in "256 images 1x28x28"."""

    @abstractmethod
    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """A random batch."""

    @abstractmethod
    def loss(self, called: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
        """As fastmp's users write it, of a model converted to ``dtype``."""

    @abstractmethod
    def amp_loss(self, called: nn.Module, autocast: Autocast, *inputs: Tensor) -> Tensor:
        """As PyTorch's documentation writes it, of an fp32 model."""


@dataclass(frozen=True, kw_only=True)
class Images(Workload):
    """Classes of uint8 images: normalise, mixup, forward, loss of the mixed pair with smoothing."""

    shape: Shape
    classes: int

    @property
    def label(self) -> str:
        """The batch."""
        return f"{self.batch} images {'x'.join(map(str, self.shape))}"

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Images, labels and λ."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, *self.shape)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(device), labels.to(device), torch.tensor(LAM, device=device)

    def loss(self, called: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
        """Two passes: ``mix``, which normalises and casts too, and the loss."""
        images, labels, lam = inputs
        partner = torch.arange(len(images) - 1, -1, -1, device=images.device)
        mean, std = ((value,) * images.shape[1] for value in (MEAN, STD))
        x = fastmp.functional.mix(images, lam, partner, mean=mean, std=std, dtype=dtype)
        return fastmp.functional.cross_entropy(
            called(x), labels, label_smoothing=SMOOTHING, target_b=labels.flip(0), lam=lam
        )

    def amp_loss(self, called: nn.Module, autocast: Autocast, *inputs: Tensor) -> Tensor:
        """Under autocast."""
        images, labels, lam = inputs
        with autocast():
            x = images.float() * (1 / (255 * STD)) - MEAN / STD
            logits = called(lam * x + (1 - lam) * x.flip(0))
            pair = partial(F.cross_entropy, logits, label_smoothing=SMOOTHING)
            return lam * pair(labels) + (1 - lam) * pair(labels.flip(0))

    def normalised(self, images: Tensor) -> Tensor:
        """Of a test, in fp32."""
        return (images.float() / 255 - MEAN) / STD


@dataclass(frozen=True, kw_only=True)
class Text(Workload):
    """The next token of random text, by a causal language model of Hugging Face's interface."""

    vocabulary: int
    length: int

    @property
    def label(self) -> str:
        """The batch."""
        return f"{self.batch} x {self.length} tokens"

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Tokens, one more than a sample has positions."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.length + 1)
        return (torch.randint(self.vocabulary, shape, generator=generator).to(device),)

    def loss(self, called: nn.Module, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
        """The loss of 16-bit logits, in fp32."""
        (tokens,) = inputs
        logits = called(input_ids=tokens[:, :-1], use_cache=False).logits
        return fastmp.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def amp_loss(self, called: nn.Module, autocast: Autocast, *inputs: Tensor) -> Tensor:
        """Under autocast, which casts the logits to fp32."""
        (tokens,) = inputs
        with autocast():
            logits = called(input_ids=tokens[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
