"""A resumed run with other settings: which stay those of the run, which may change, and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastmp import data
from fastmp.recipe.config import ConfigError, TrainConfig
from fastmp.training.trainer import Trainer

#: Settings of which a run has one value from its first step to its last: weights, optimizer state,
#: loss scale and the order of the samples come from it.
FIXED = (
    "model",
    "optimizer",
    "init_from",
    "freeze",
    "layer_decay",
    "dtype",
    "loss_scale",
    "seed",
)


def changes(recorded: TrainConfig, given: TrainConfig, folder: Path) -> str:
    """The settings in which ``given`` differs from those of the run in ``folder``: "lr 0.1 -> 0.2".

    Raises:
        ConfigError: a setting that a run cannot change; the message has both values.
    """
    changed = []
    for field in dataclasses.fields(TrainConfig):
        name = field.name
        old, new = getattr(recorded, name), getattr(given, name)
        if old == new or name == "out" or (name, new) == ("dtype", "auto"):
            continue
        if name in FIXED or (name == "data" and not _same_kind(old, new)):
            raise ConfigError(
                f"{name}: expected {_shown(old)}, as the run in {folder} has it, got "
                f"{_shown(new)}; a resumed run cannot change it: leave the flag out, or start a "
                f"new run with --init-from {folder}"
            )
        changed.append(f"{name} {_shown(old)} -> {_shown(new)}")
    return ", ".join(changed)


def _same_kind(old: str, new: str) -> bool:
    """Whether both are folders, which may have moved, or both are of Hugging Face."""
    return not {old, new} & data.DATASETS.keys() and old.startswith("hf:") == new.startswith("hf:")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def load_newest(trainer: Trainer, config: TrainConfig) -> bool:
    """Load the newest checkpoint into a trainer built from ``config``; False if there is none.

    The loaded state has the hyperparameters of the run so far; those of ``config`` replace them.
    The learning rate is the schedule's.

    Raises:
        ConfigError: fewer epochs than the run has finished.
        CheckpointError: all checkpoints are damaged, or of another model or optimizer.
    """
    own = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in trainer.optimizer.param_groups
    ]
    if not trainer.resume_newest():
        return False
    assert config.epochs is not None, "the config must be resolved"
    if config.epochs < trainer.epoch:
        raise ConfigError(
            f"epochs: expected at least the {trainer.epoch} that the run has finished, got "
            f"{config.epochs}"
        )
    for group, values in zip(trainer.optimizer.param_groups, own, strict=True):
        group.update(values)
    scale, interval = trainer.scaler.state_dict(), config.scale_growth_interval
    if scale:
        # the count of steps is compared for equality: beyond a shorter interval it never is
        count = scale["_growth_tracker"] % interval
        trainer.scaler.load_state_dict(
            {**scale, "growth_interval": interval, "_growth_tracker": count}
        )
    return True
