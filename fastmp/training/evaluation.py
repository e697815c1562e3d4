"""Loss and accuracy over a data set, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmp import transfer
from fastmp.distributed.rendezvous import World


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per sample, and the share of samples whose largest logit is the right one."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    criterion: nn.Module,
    *,
    plain: Callable[[Tensor], Tensor] | None,
    world: World,
    after_batch: Callable[[], None],
    in_step: bool = False,
) -> Evaluation:
    """The mean of ``criterion`` and the accuracy over all samples of all ranks.

    Args:
        model: maps images to logits (N, classes); comes back in the mode it had.
        loader: this rank's batches of (images, labels); their numbers may differ between ranks.
        criterion: a loss of (logits, labels), the mean over a batch.
        plain: what becomes of images before the model; None: nothing.
        world: the ranks, all of which must call this.
        after_batch: called after each.
        in_step: every rank must run the model equally often, because its layers exchange weights:
            ranks with fewer batches run their last one again, and do not count it.

    Raises:
        ValueError: no rank has a batch, or ``in_step`` and this one has none.
        TypeError: ``in_step``, and the loader has no length.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    spare = 0
    if in_step:
        if not isinstance(loader, Sized):
            raise TypeError("a model in shards needs a loader with a length to be evaluated")
        spare = world.max(len(loader)) - len(loader)
        if world.max(len(loader) == 0):
            raise ValueError("a model in shards needs a batch on every rank to be evaluated")
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right ones, samples
    try:
        for images, labels in loader:
            images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
            logits = model(images if plain is None else plain(images))
            loss = criterion(logits, labels).double() * len(labels)
            right = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss, right.double(), torch.full_like(loss, len(labels))])
            after_batch()
        for _ in range(spare):
            model(images if plain is None else plain(images))
    finally:
        if training:
            transfer.train_mode(model)
    loss_sum, right_sum, samples = world.sum(sums).tolist()
    if samples == 0:
        raise ValueError("the loader gave no batches; expected at least one")
    return Evaluation(loss_sum / samples, right_sum / samples)
