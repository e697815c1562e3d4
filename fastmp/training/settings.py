"""The arguments of ``fastmp.Trainer``, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fastmp import transfer
from fastmp.data.mixup import Mixup
from fastmp.distributed.fsdp import Shards
from fastmp.distributed.rendezvous import World
from fastmp.distributed.sampling import Splitter
from fastmp.nn import CrossEntropyLoss
from fastmp.optim.base import FusedOptimizer
from fastmp.training.batches import Prepare
from fastmp.training.progress import EpochResult, StepResult


@dataclass(frozen=True, eq=False)
class Settings:
    """What ``fastmp.Trainer`` was given, checked; its docstring says what each setting does.

    The schedule is not among them: it may change during a run, and belongs to the training step.

    Raises:
        TypeError: an optimizer that is not fastmp's, or mixup with a loss that is not.
        ValueError: ``accumulate`` below 1, ``save_every`` below 0, ``report`` without a folder,
            fp16 weights without an enabled scaler, ``shards`` with a setting that needs whole
            parameters, or, with several ranks, a model that is wrapped for them.
    """

    model: nn.Module
    optimizer: FusedOptimizer
    criterion: nn.Module
    scaler: torch.amp.GradScaler
    mixup: Mixup | None
    accumulate: int
    ema: float | None
    unfreeze: transfer.GradualUnfreezing | None
    cuda_graph: bool
    telemetry: bool
    shards: Shards | None
    folder: Path | None
    save_every: int
    keep: int
    prepare_batch: Prepare
    on_step: Callable[[StepResult], object] | None
    on_epoch: Callable[[EpochResult], object] | None
    report: bool
    progress: bool
    world: World

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, FusedOptimizer):
            raise TypeError(
                "expected an optimizer from fastmp.optim, which reports what its steps decided, "
                f"got {type(self.optimizer).__name__}"
            )
        if self.mixup is not None and not isinstance(self.criterion, CrossEntropyLoss):
            raise TypeError(
                "mixup gives mixed targets, which fastmp.nn.CrossEntropyLoss takes, "
                f"got {type(self.criterion).__name__}"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.save_every < 0:
            raise ValueError(f"save_every must be at least 0, got {self.save_every}")
        if self.report and self.folder is None:
            raise ValueError("report=True writes into the folder of the run, got folder=None")
        self._check_scaler()
        wrapped = [
            type(m).__name__
            for m in self.model.modules()
            if isinstance(m, DistributedDataParallel | FullyShardedDataParallel)
        ]
        if wrapped and self.world.size > 1:
            raise ValueError(
                f"expected the model itself, got it in {wrapped[0]}: the trainer makes it data "
                "parallel; to split it, see fastmp.distributed.fsdp.shard"
            )
        if self.shards is not None and (self.unfreeze or self.cuda_graph or self.telemetry):
            raise ValueError("unfreeze, cuda_graph, telemetry: expected none of them with shards")

    def _check_scaler(self) -> None:
        groups = self.optimizer.param_groups
        trained = {p.dtype for g in groups for p in g["params"] if p.requires_grad}
        if torch.float16 in trained and not self.scaler.is_enabled():
            raise ValueError(
                "fp16 weights need a loss scale, or small gradients become 0: pass "
                "scaler=fastmp.amp.GradScaler(device), enabled, or train in bf16"
            )

    @cached_property
    def split(self) -> Splitter:
        """Gives each rank its own batches of a loader."""
        return Splitter(self.world)

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device
