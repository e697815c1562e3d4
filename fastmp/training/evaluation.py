"""Loss and accuracy over a data set, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmp import transfer
from fastmp.amp.accumulation import loss_divisor, weighted
from fastmp.distributed import data_parallel
from fastmp.distributed.rendezvous import World
from fastmp.training.settings import Settings
from fastmp.training.step import Batch


@dataclass(frozen=True)
class Evaluation:
    """The loss of all samples as one batch (a sum is divided by their number), and the accuracy.

    That is the fraction of labels, other than ignored ones, that have the largest logit.
    """

    loss: float
    accuracy: float


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in eval mode; afterwards it is as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            transfer.train_mode(model)


@torch.no_grad()
def evaluate(
    settings: Settings, loader: Iterable[Batch], after_batch: Callable[[], None]
) -> Evaluation:
    """The loss and the accuracy over all samples of all ranks, which must all call this.

    The layers of a model in shards exchange weights, so every rank runs it equally often: ranks
    with fewer batches run their last one again, without counting it.

    Args:
        settings: model, criterion, mixup, world and shards of the trainer.
        loader: of (images, labels). A ``DataLoader`` is split over the ranks; anything else gives
            this rank's batches, and the ranks may have unequal numbers of them.
        after_batch: called after each batch.

    Raises:
        ValueError: no rank has a batch; with shards, one rank has none.
        TypeError: with shards, the loader has no length.
    """
    model, world, device = settings.model, settings.world, settings.device
    prepare = torch.nn.Identity() if settings.mixup is None else settings.mixup.plain
    loader = settings.split(loader, training=False)
    padding_steps = 0 if settings.shards is None else _padding_steps(loader, world)
    if world.size > 1:  # every rank has its own batch norm statistics: rank 0's count
        data_parallel.broadcast_buffers(model)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with eval_mode(model):
        for batch in loader:
            pair = settings.prepare_batch(batch)
            images, labels = (t.to(device, non_blocking=True) for t in pair)
            logits = model(prepare(images))
            sums += _sums(settings.criterion, logits, labels)
            after_batch()
        for _ in range(padding_steps):
            model(prepare(images))
    loss_sum, divisor, correct, counted = world.sum(sums).tolist()
    if divisor == 0 or counted == 0:
        raise ValueError("the loader gave no batches with labels that count; expected at least one")
    return Evaluation(loss_sum / divisor, correct / counted)


def _sums(criterion: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Of one batch, fp64 (4): loss and its divisor, correct labels and all that count."""
    loss, divisor = criterion(logits, labels).double(), loss_divisor(criterion, labels)
    if divisor is None:  # a sum already
        divisor = len(labels)
    else:
        loss = weighted(loss, divisor)
    if labels.shape == logits.shape:  # class probabilities
        labels = labels.argmax(1)
    correct = logits.argmax(1) == labels
    ignored = getattr(criterion, "ignore_index", None)
    counted = torch.ones_like(correct) if ignored is None else labels != ignored
    if not isinstance(divisor, Tensor):
        divisor = torch.full_like(loss, divisor)
    return torch.stack([loss, divisor, (correct & counted).sum(), counted.sum()])


def _padding_steps(loader: Iterable[Any], world: World) -> int:
    """The runs of the model that this rank has fewer than the rank with the most batches."""
    if not isinstance(loader, Sized):
        raise TypeError("a model in shards needs a loader with a length to be evaluated")
    most = world.max(len(loader))
    if world.max(len(loader) == 0):
        raise ValueError("a model in shards needs a batch on every rank to be evaluated")
    return most - len(loader)
