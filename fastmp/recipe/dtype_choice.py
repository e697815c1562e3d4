"""The dtype of a recipe with ``dtype = "auto"``: by what the machine is.

    GPU of compute capability 8.0 or later     bf16
    GPU of compute capability 7.x              fp16: it has no bf16 products
    CPU with bf16 products (AVX512-BF16, AMX)  bf16 if a training step is 1.25 times as fast, else
                                               fp32: that depends on the model
    any other                                  fp32

Equal commands have to train equally, so the measurement is made once: the answer is kept in the
cache folder, by processor, threads, versions, instruction set of the kernels, model, images and
batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import torch
from torch import nn

import fastmp
from fastmp import files
from fastmp.backends import cpu
from fastmp.backends.cpu import gemm_choice
from fastmp.data import Dataset
from fastmp.distributed.rendezvous import World
from fastmp.recipe import dtype_probe
from fastmp.recipe.build import build_trainer
from fastmp.recipe.config import DTYPES, DtypeName, TrainConfig
from fastmp.report.environment import device_name
from fastmp.training.trainer import Trainer

FILE = "dtype-choice.json"  # in the cache folder
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # as Linux names them; ARM's last


def choose_dtype(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device, world: World
) -> DtypeName:
    """The dtype to train in; with "auto" the first rank decides and the others follow."""
    if config.dtype != "auto":
        return config.dtype
    chosen = _decided(config, dataset, model, device) if world.is_first else None
    return cast(DtypeName, world.broadcast_object(chosen))


def from_table(device: torch.device) -> tuple[DtypeName | None, str]:
    """The dtype and the reason; None where a measurement decides."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = f"by compute capability {capability[0]}.{capability[1]}"
        if capability >= (7, 0):
            return ("bf16" if capability >= (8, 0) else "fp16"), reason
        return "fp32", reason
    if device.type == "cpu" and BF16_FEATURES & gemm_choice.processor().features:
        return None, "a CPU with bf16 products"
    return "fp32", "no bf16 products here"


def _decided(config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device) -> str:
    known, reason = from_table(device)
    if known is not None:
        print(f"dtype: {known}, {reason}")
        return known
    kept = files.recall(FILE, key := _key(config, dataset, model, device))
    if isinstance(kept, dict) and kept.get("dtype") in DTYPES:
        print(f"dtype: {kept['dtype']}, as measured before: {files.cache_dir() / FILE}")
        return str(kept["dtype"])
    measured = _measured(config, dataset, model, device)
    answer = {"dtype": measured.chosen, "milliseconds": measured.milliseconds}
    where = f"kept in {files.cache_dir() / FILE}"
    if not files.remember(FILE, key, answer):
        where = f"not kept: {files.cache_dir()} cannot be written"
    print(f"dtype: {measured.chosen} ({measured}); {where}")
    return measured.chosen


def _key(config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device) -> str:
    """What the speed depends on."""
    return ", ".join(
        (
            device_name(device),
            f"torch {torch.__version__}",
            f"fastmp {fastmp.__version__}, {cpu.instruction_set(cpu.load()[0])}",
            f"{config.model} of {sum(p.numel() for p in model.parameters())} parameters",
            f"{config.batch_size} images of {'x'.join(map(str, dataset.shape))}",
        )
    )


def _measured(
    config: TrainConfig, dataset: Dataset, model: nn.Module, device: torch.device
) -> dtype_probe.Measurement:
    assert config.batch_size is not None
    plain = dataclasses.replace(config, cuda_graph=False, telemetry=False, shard=False)
    steps: dict[str, dtype_probe.Step] = {}
    for name in ("fp32", "bf16"):
        trainer = build_trainer(
            plain, dataset, model, DTYPES[name], device, total_steps=1000, progress=False,
            world=World(),
        )  # fmt: skip
        steps[name] = functools.partial(_step, trainer, dataset)
    return dtype_probe.fastest(steps, min(config.batch_size, len(dataset.train)))


def _step(trainer: Trainer, dataset: Dataset, samples: int) -> None:
    trainer.train_step([dataset.train.batch(list(range(samples)))])
