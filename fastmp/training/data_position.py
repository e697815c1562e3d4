"""The place in the data: the batches of an epoch from any of them on, in the order they had.

fastmp's own loaders compute their order from the seed and the number of the epoch, so a place is
two numbers. Any other loader draws its order from random number generators when an epoch begins:
their states are kept, and to get back, the batches that are done are drawn again and thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastmp.training import rng


def begin(loader: Iterable[Any], epoch: int, device: torch.device) -> dict[str, Any]:
    """Tell ``loader`` that ``epoch`` (from 0) begins; what ``batches`` will need to come back."""
    for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))):
        set_epoch = getattr(part, "set_epoch", None)  # ours, and torch's DistributedSampler
        if set_epoch is not None:
            set_epoch(epoch)
    if hasattr(loader, "start_at"):
        return {}
    return {"global": rng.state(device), "own": own_state(loader)}


def batches(
    loader: Iterable[Any], done: int, start: dict[str, Any], device: torch.device
) -> Iterator[Any]:
    """The batches of the epoch that has begun, without the first ``done``.

    Args:
        loader: as given to ``begin``.
        done: how many of its batches are behind us.
        start: what ``begin`` returned when this epoch began, be it in another process.
        device: whose generator the loader may draw from.
    """
    if done == 0:
        return iter(loader)
    if hasattr(loader, "start_at"):
        loader.start_at(done)
        return iter(loader)
    now = rng.state(device)
    rng.restore(start["global"], device)
    restore_own_state(loader, start["own"])
    iterator = iter(loader)
    for _ in range(done):
        next(iterator, None)
    rng.restore(now, device)
    return iterator


def own_state(loader: Iterable[Any] | None) -> dict[str, Any]:
    """The states of the generators that a loader has to itself, by where they are found."""
    return {name: generator.get_state() for name, generator in _generators(loader).items()}


def restore_own_state(loader: Iterable[Any], states: dict[str, Any]) -> None:
    """Put a loader's own generators back to ``states``."""
    for name, generator in _generators(loader).items():
        if name in states:
            generator.set_state(states[name])


def _generators(loader: Any) -> dict[str, torch.Generator]:
    parts = {"loader": loader, "sampler": getattr(loader, "sampler", None)}
    found = {name: getattr(part, "generator", None) for name, part in parts.items()}
    return {name: g for name, g in found.items() if isinstance(g, torch.Generator)}
