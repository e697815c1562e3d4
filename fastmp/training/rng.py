"""The states of all random number generators that a training run draws from, for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all generators with one number."""
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - users draw from it
    torch.manual_seed(number)


def state(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of Python, NumPy, torch and the device."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - users draw from it
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, np.int64)), *map(_plain, rest)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Set all generators to ``states``, a result of ``state``.

    A run that moves from a CPU to a GPU, or back, keeps the states that both have.
    """
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _plain(number: Any) -> int | float:
    return float(number) if isinstance(number, float) else int(number)
