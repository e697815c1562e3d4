"""Device, data, model, optimizer, schedule and trainer of a recipe."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import torch
from torch import nn

from fastmp import amp, data, models, optim, transfer
from fastmp.data import Dataset
from fastmp.data.mixup import Mixup
from fastmp.distributed import fsdp, rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.nn import CrossEntropyLoss
from fastmp.optim.base import FusedOptimizer
from fastmp.recipe.config import ConfigError, TrainConfig
from fastmp.report.environment import working_device
from fastmp.schedule import Constant, Cosine, Cyclic, OneCycle, Schedule, Warmup
from fastmp.training.trainer import Trainer

LION_BETA2 = 0.99  # of the paper; Adam's 0.999 averages ten times as long


def device_of(config: TrainConfig) -> torch.device:
    """The device of the recipe; of several GPUs that of this process.

    Raises:
        ConfigError: this machine has no such device.
    """
    try:
        return working_device(config.device)
    except ValueError as error:
        raise ConfigError(f"device: {error}") from error


def load_data(config: TrainConfig) -> Dataset:
    """The recipe's data set; its ``notes`` are for the command to print.

    Raises:
        fastmp.data.DataError: it cannot be found or read.
    """
    return data.load(config.data, image_size=config.image_size, warn=False)


def loaders(
    config: TrainConfig, dataset: Dataset, device: torch.device, world: World
) -> tuple[data.Loader, data.Loader]:
    """Batches for training and testing, in a process group this rank's part of them.

    Raises:
        ConfigError: fewer training samples than processes.
    """
    if len(dataset.train) < world.size:
        raise ConfigError(
            f"data: expected a training sample for each of {world.size} processes, got "
            f"{len(dataset.train)}"
        )
    assert config.batch_size is not None, "the config must be resolved"
    train, test = (
        data.loader(
            source,
            size,
            shuffle=shuffle,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            workers=workers(config),
            device=device,
        )
        for source, size, shuffle in (
            (dataset.train, config.batch_size, True),
            (dataset.test, 1000, False),
        )
    )
    return train, test


def workers(config: TrainConfig) -> int:
    """Processes that decode images: at most one a core, beyond which they only take memory."""
    available = getattr(os, "sched_getaffinity", None)  # Linux: a container may have few of them
    cores = len(available(0)) if available else os.cpu_count() or 1
    return min(config.workers, cores)


def build_model(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The model with its initial weights, fp32 on the CPU, determined by the seed.

    Raises:
        fastmp.models.ModelError: there is no model of this name.
    """
    torch.manual_seed(config.seed)
    return models.build(config.model, dataset.shape, len(dataset.classes))


def load_pretrained(config: TrainConfig, model: nn.Module) -> transfer.Report | None:
    """Load the weights that the recipe starts from into ``model``.

    Raises:
        fastmp.transfer.TransferError: they cannot be read, or none of them fits.
    """
    if config.init_from is None:
        return None
    return transfer.load_pretrained(model, config.init_from)


def build_trainer(
    config: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    total_steps: int,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    world: World | None = None,
) -> Trainer:
    """A trainer for a copy of ``model`` in ``dtype`` on ``device``.

    Args:
        config: resolved.
        dataset: gives the normalisation.
        model: fp32; the trainer has a copy.
        total_steps: optimizer steps of the whole run, the length of the schedule.
        folder, progress, world: as ``Trainer`` takes them.
    """
    world = rendezvous.joined() if world is None else world
    trained = copy.deepcopy(model).to(device)
    if config.freeze:
        transfer.freeze(trained, *config.freeze)
    shards = fsdp.shard(trained, dtype) if config.shard else None
    if shards is None:
        amp.convert(trained, dtype)
    optimizer = _optimizer(config, trained, shards)
    return Trainer(
        trained,
        optimizer,
        CrossEntropyLoss(label_smoothing=config.label_smoothing),
        schedule=_schedule(config, total_steps),
        scaler=amp.GradScaler(
            device.type,
            init_scale=config.loss_scale,
            growth_interval=config.scale_growth_interval,
            enabled=dtype == torch.float16,
        ),
        mixup=_mixup(config, dataset, dtype, world.rank),
        accumulate=config.accumulate,
        ema=config.ema or None,
        unfreeze=_unfreezing(config),
        cuda_graph=config.cuda_graph,
        telemetry=config.telemetry,
        shards=shards,
        folder=folder,
        save_every=config.save_every,
        keep=config.keep,
        progress=progress,
        world=world,
    )


def _mixup(config: TrainConfig, dataset: Dataset, dtype: torch.dtype, rank: int) -> Mixup:
    """Every rank draws its own mixup; rank 0 draws that of a single process."""
    return Mixup(
        config.mixup,
        config.cutmix,
        generator=torch.Generator().manual_seed((config.seed + (rank << 32)) % 2**63),
        mean=dataset.mean,
        std=dataset.std,
        dtype=dtype,
    )


def _unfreezing(config: TrainConfig) -> transfer.GradualUnfreezing | None:
    if config.unfreeze_every == 0:
        return None
    return transfer.GradualUnfreezing(every=config.unfreeze_every)


#: ``state_dtype`` of a recipe, as the optimizers take it.
STATE_DTYPES: dict[str, torch.dtype | str | None] = {
    "fp32": None, "bf16": torch.bfloat16, "8bit": "8bit"
}  # fmt: skip


def _optimizer(config: TrainConfig, model: nn.Module, shards: fsdp.Shards | None) -> FusedOptimizer:
    assert config.lr is not None, "the config must be resolved"
    groups = transfer.layerwise_lr(
        model, config.lr, config.layer_decay, weight_decay=config.weight_decay
    )
    if shards is not None:
        for group in groups:
            group["params"] = [(name, shards[name]) for name, _ in group["params"]]
    kept: dict[str, Any] = {
        "max_grad_norm": None if config.max_grad_norm == math.inf else config.max_grad_norm,
        "state_dtype": STATE_DTYPES[config.state_dtype],
        "master": None if config.master == "auto" else config.master,
    }
    betas = (config.momentum, config.beta2)
    optimizer: FusedOptimizer
    if config.optimizer == "sgd":
        optimizer = optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            **kept,
        )
    elif config.optimizer == "muon":
        optimizer = optim.Muon(
            optim.muon_groups(model, adamw={"betas": betas}, groups=groups),
            lr=config.lr,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
            **kept,
        )
    elif config.optimizer == "lion":
        betas = (config.momentum, LION_BETA2)
        optimizer = optim.Lion(groups, lr=config.lr, betas=betas, **kept)
    else:
        kind = optim.AdamW if config.optimizer == "adamw" else optim.Adam
        optimizer = kind(groups, lr=config.lr, betas=betas, **kept)
    if shards is not None:
        shards.attach(optimizer)
    return optimizer


def _schedule(config: TrainConfig, total_steps: int) -> Schedule:
    lr = config.lr
    assert lr is not None, "the config must be resolved"
    warmup = round(config.warmup * total_steps)
    if config.schedule == "constant":
        return Warmup(Constant(lr, config.momentum), warmup)
    if config.schedule == "cosine":
        return Warmup(Cosine(lr, max(total_steps - warmup, 1), momentum=config.momentum), warmup)
    if config.schedule == "cyclic":
        return Cyclic(
            lr / 25,  # the initial lr of one-cycle
            lr,
            step_size_up=max(1, round(total_steps / (2 * config.cycles))),
            mode="triangular2",
            base_momentum=config.peak_momentum,
            max_momentum=config.momentum,
        )
    return OneCycle(
        lr,
        total_steps,
        pct_start=config.warmup,
        base_momentum=config.peak_momentum,
        max_momentum=config.momentum,
    )
