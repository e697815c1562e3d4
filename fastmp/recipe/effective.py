"""The settings of a recipe that had an effect, for its report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fastmp import data
from fastmp.recipe.config import TrainConfig


def _of_files(config: TrainConfig) -> bool:
    return config.data not in data.DATASETS


def _fp16(config: TrainConfig) -> bool:
    return config.dtype == "fp16"


def _momentum_moves(config: TrainConfig) -> bool:
    return config.schedule in ("one-cycle", "cyclic")


#: Settings that others switch off; the rest has an effect unless its value is a zero of its kind.
_NEEDS: dict[str, Callable[[TrainConfig], bool]] = {
    "image_size": _of_files,
    "workers": _of_files,
    "accumulate": lambda config: config.accumulate > 1,
    "cycles": lambda config: config.schedule == "cyclic",
    "warmup": lambda config: config.schedule != "cyclic",
    "peak_momentum": _momentum_moves,
    "beta2": lambda config: config.optimizer != "sgd",
    "max_grad_norm": lambda config: config.max_grad_norm < math.inf,
    "layer_decay": lambda config: config.layer_decay < 1,
    "loss_scale": _fp16,
    "scale_growth_interval": _fp16,
    "device": lambda config: config.device != "auto",
    "out": lambda config: False,
}


def effective(config: TrainConfig) -> dict[str, Any]:
    """The settings of a resolved recipe without those that are off, by name."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        off = not value and field.name != "seed"
        needs = _NEEDS.get(field.name)
        if not off and (needs is None or needs(config)):
            found[field.name] = ", ".join(value) if isinstance(value, tuple) else value
    return found
