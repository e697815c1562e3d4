"""The dtype of a recipe with ``dtype = "auto"``."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import torch
from torch import nn

from fastmp.data import Dataset
from fastmp.distributed.rendezvous import World
from fastmp.recipe import dtype_probe
from fastmp.recipe.build import build_trainer
from fastmp.recipe.config import DTYPES, DtypeName, TrainConfig
from fastmp.training.trainer import Trainer


def choose_dtype(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device, world: World
) -> DtypeName:
    """The dtype to train in; with "auto" the first rank measures and the others follow."""
    if config.dtype != "auto":
        return config.dtype
    fastest = _measure_dtypes(config, dataset, model, device) if world.is_first else None
    return cast(DtypeName, world.broadcast_object(fastest))


def _measure_dtypes(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device
) -> str:
    assert config.batch_size is not None
    plain = dataclasses.replace(config, cuda_graph=False, telemetry=False, shard=False)
    steps: dict[str, dtype_probe.Step] = {}
    for name, dtype in DTYPES.items():
        trainer = build_trainer(
            plain, dataset, model, dtype, device, total_steps=1000, progress=False, world=World()
        )
        steps[name] = functools.partial(_step, trainer, dataset)
    measured = dtype_probe.fastest(steps, min(config.batch_size, len(dataset.train)))
    print(f"dtype: {measured}")
    return measured.chosen


def _step(trainer: Trainer, dataset: Dataset, samples: int) -> None:
    trainer.train_step([dataset.train.batch(list(range(samples)))])
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
