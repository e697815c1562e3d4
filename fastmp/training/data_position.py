"""The position in the data: the rest of an epoch's batches from any batch on, in the same order.

fastmp's own loaders compute their order from the seed and the epoch number, so a position is two
numbers. Any other loader draws its order from random number generators when an epoch begins: their
states are saved, and to resume, the finished batches are drawn again and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastmp.training import rng


def begin(loader: Iterable[Any], epoch: int, device: torch.device) -> dict[str, Any]:
    """Start ``epoch`` (from 0) in ``loader``; returns what ``batches`` needs to resume it."""
    for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))):
        set_epoch = getattr(part, "set_epoch", None)  # fastmp's, and torch's DistributedSampler
        if set_epoch is not None:
            set_epoch(epoch)
    if hasattr(loader, "start_at"):
        return {}
    return {"global": rng.state(device), "own": own_state(loader)}


def batches(
    loader: Iterable[Any], done: int, start: dict[str, Any], device: torch.device
) -> Iterator[Any]:
    """The batches of the current epoch, without the first ``done``.

    Args:
        loader: as given to ``begin``.
        done: number of finished batches.
        start: the result of ``begin`` for this epoch, in this process or in an earlier one.
        device: the loader may draw from its generator.
    """
    if done == 0:
        return iter(loader)
    if hasattr(loader, "start_at"):
        loader.start_at(done)
        return iter(loader)
    now = rng.state(device)
    if start:  # else the epoch was begun by other ranks: its order is lost
        rng.restore(start["global"], device)
        restore_own_state(loader, start["own"])
    iterator = iter(loader)
    for _ in range(done):
        next(iterator, None)
    rng.restore(now, device)
    return iterator


def own_state(loader: Iterable[Any] | None) -> dict[str, Any]:
    """The states of a loader's own generators, by the attribute that holds them."""
    return {name: generator.get_state() for name, generator in _generators(loader).items()}


def restore_own_state(loader: Iterable[Any], states: dict[str, Any]) -> None:
    """Set a loader's own generators to ``states``."""
    for name, generator in _generators(loader).items():
        if name in states:
            generator.set_state(states[name])


def _generators(loader: Any) -> dict[str, torch.Generator]:
    parts = {"loader": loader, "sampler": getattr(loader, "sampler", None)}
    found = {name: getattr(part, "generator", None) for name, part in parts.items()}
    return {name: g for name, g in found.items() if isinstance(g, torch.Generator)}
