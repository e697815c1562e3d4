"""One optimizer step: forward, loss, backward, exchange, update; as kernels or as a CUDA graph.

The host waits for nothing here. Loss, norm and the decision to skip stay on the device, and the
learning rate is read there, from a table indexed by the applied steps. So a whole step can be
recorded as a CUDA graph and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmp import transfer
from fastmp.amp.accumulation import Accumulator, batch_weights, weighted
from fastmp.amp.underflow import Telemetry
from fastmp.data.mixup import MixParams, mix_target
from fastmp.distributed import data_parallel
from fastmp.nn import CrossEntropyLoss
from fastmp.ops.loss import MixedTarget
from fastmp.optim.lr_scheduler import apply
from fastmp.optim.schedule_table import tabulate
from fastmp.schedule import Schedule, evaluate
from fastmp.training import cuda_graph
from fastmp.training.ema import EMA
from fastmp.training.graph_constants import GraphConstants
from fastmp.training.schedule_place import SchedulePlace
from fastmp.training.settings import Settings

Batch = tuple[Tensor, Tensor]


class PreparedBatch(NamedTuple):
    """A batch on its device, and its mixup parameters; None: the batch is not mixed."""

    images: Tensor
    labels: Tensor
    draw: MixParams | None


class StepOutput(NamedTuple):
    """The results of a step: 0-d tensors on the device. The next step may overwrite them."""

    loss: Tensor
    scale: Tensor  # of the gradients
    grad_norm: Tensor  # of the unscaled gradients, before clipping
    skipped: Tensor  # 1 if a gradient was not finite, else 0
    applied: Tensor  # applied steps so far
    first_nonfinite: Tensor  # param_index in the last step that was skipped, or -1
    telemetry: tuple[Tensor, ...]  # counts named in fastmp.amp.underflow, or empty


class TrainStep:
    """Takes optimizer steps.

    Args:
        settings: those of the trainer.
        ema: updated after every step; None: there is none.
        place: in the schedule; None: it goes by applied steps.
    """

    def __init__(
        self, settings: Settings, ema: EMA | None, place: SchedulePlace | None = None
    ) -> None:
        self.settings = settings
        self.schedule: Schedule | None = None
        self.followed: Schedule | None = None  # that schedule by applied steps
        self._place = place or SchedulePlace()
        self._ema = ema
        self._telemetry = Telemetry(settings.optimizer) if settings.telemetry else None
        self._accumulator = Accumulator(
            p for group in settings.optimizer.param_groups for p in group["params"]
        )
        self._parallel: nn.Module | None = None  # the model, wrapped for data parallel training
        self._not_tabulated = ""  # why the schedule is not on the device; empty: it is
        self._graph: cuda_graph.Graphed | None = None
        self._recorder: cuda_graph.CudaRecorder | None = None
        self.uses_graph = settings.cuda_graph  # until a recording fails

    # ---- before a run, before an epoch ----

    def set_schedule(self, schedule: Schedule | None, steps: int | None = None) -> None:
        """Follow ``schedule`` from the next step on; None: leave the optimizer's settings alone.

        A schedule that can be tabulated is followed on the device. Any other one is applied by the
        host before each update, which on a GPU waits for the number of applied steps.

        Args:
            schedule: (lr, momentum) of the number of applied steps.
            steps: applied steps to tabulate; None: the schedule's own length.
        """
        optimizer = self.settings.optimizer
        if self.schedule is not None and not self._not_tabulated:
            optimizer.clear_schedule()
        self.schedule, self._not_tabulated = schedule, ""
        self.followed = self._place.follow(schedule)
        if self._graph is not None:
            self._graph.reset()
        if self.followed is None:
            return
        try:
            lr, momentum = tabulate(self.followed, steps)
            if momentum and 0.0 in momentum and "momentum" in optimizer.defaults:
                raise ValueError("with momentum 0 SGD must leave its buffer alone")
            optimizer.set_schedule(lr, momentum)
        except ValueError as reason:
            self._not_tabulated = str(reason)

    @contextmanager
    def run(self, steps: int | None) -> Iterator[None]:
        """In the block ``steps`` steps are taken (None: unknown), as CUDA graphs if wanted."""
        self.settings.optimizer.accept_group_rates()  # a resumed run may have got others
        endless = getattr(self.schedule, "length", None) is None
        if endless and steps:
            self.set_schedule(self.schedule, int(self.settings.optimizer.applied_steps) + steps)
        elif self._place.follow(self.schedule) != self.followed:
            self.set_schedule(self.schedule)
        self._warn_if_schedule_is_for_one_rank(steps)
        if self.uses_graph:
            self._record()
        try:
            yield
        finally:
            self._graph = None
            if endless:  # later steps are not in the table
                self.set_schedule(self.schedule)

    def _warn_if_schedule_is_for_one_rank(self, steps: int | None) -> None:
        """A schedule made from the length of a loader that was split afterwards does not end."""
        world, length = self.settings.world, getattr(self.followed, "length", None)
        if world.size == 1 or not world.is_first or steps is None or length is None:
            return
        end = int(self.settings.optimizer.applied_steps) + steps
        if end * 1.5 < length:
            warnings.warn(
                f"the schedule has {length} steps, and the run ends at {end}: each of "
                f"{world.size} ranks has its own part of the batches, so an epoch has fewer steps",
                UserWarning,
                stacklevel=5,
            )

    def _record(self) -> None:
        world = self.settings.world
        warmup = cuda_graph.WARMUP if world.size == 1 else cuda_graph.WARMUP_PARALLEL
        try:
            self._recorder = cuda_graph.CudaRecorder(self.settings.device)
            constants = GraphConstants(
                [self.settings.optimizer],
                [self.settings.model, self.settings.criterion],
                [self.settings.scaler],
            )
            self._graph = cuda_graph.Graphed(self._run, self._recorder, constants, warmup)
            if self._not_tabulated:
                raise cuda_graph.Unsupported(f"the schedule has no table: {self._not_tabulated}")
        except cuda_graph.Unsupported as reason:
            self._stop_recording(reason)

    def begin_epoch(self, epoch: int) -> None:
        """Prepare the model: layers that train from now on, training mode, data parallel."""
        settings, model = self.settings, self.settings.model
        layers_changed = settings.unfreeze is not None and settings.unfreeze.plan(model, epoch)
        transfer.train_mode(model)
        if self._parallel is None or layers_changed:
            self._wrap_model()

    def _wrap_model(self) -> None:
        settings = self.settings
        self._parallel = settings.model
        if settings.world.size > 1 and settings.shards is None:
            # its buffers belong to the stream where it is made: that of the recordings
            with nullcontext() if self._recorder is None else self._recorder.stream():
                self._parallel = data_parallel.parallel(
                    settings.model, self._accumulator, static=settings.accumulate == 1
                )
        if self._graph is not None:
            self._graph.reset()

    # ---- the step ----

    def __call__(self, batches: list[Batch]) -> StepOutput:
        """One optimizer step on the loss of ``batches``, of all ranks, as if they were one.

        Raises:
            ValueError: no batch, or more than ``accumulate``.
        """
        if not 1 <= len(batches) <= self.settings.accumulate:
            raise ValueError(
                f"expected 1 to {self.settings.accumulate} batches, got {len(batches)}"
            )
        prepared = [self._prepare(*batch) for batch in batches]
        if self._graph is not None:
            try:
                output: StepOutput = self._graph(prepared)
                return output
            except cuda_graph.Unsupported as reason:
                self._stop_recording(reason)
        return self._run(prepared)

    def _prepare(self, images: Tensor, labels: Tensor) -> PreparedBatch:
        device, mixup = self.settings.device, self.settings.mixup
        images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        return PreparedBatch(images, labels, None if mixup is None else mixup.draw(images))

    def _stop_recording(self, reason: cuda_graph.Unsupported) -> None:
        """Back to single kernels."""
        if self.settings.world.is_first:
            tqdm.write(f"no CUDA graph: {reason}")
        self.uses_graph, self._graph = False, None
        self._accumulator.clear()

    def _run(self, batches: list[PreparedBatch]) -> StepOutput:
        loss, scale = self._backward(batches)
        if self.followed is not None and self._not_tabulated:
            optimizer = self.settings.optimizer
            apply(optimizer, *evaluate(self.followed, int(optimizer.applied_steps)))
        return self._update(loss, scale)

    def _backward(self, batches: list[PreparedBatch]) -> tuple[Tensor, Tensor]:
        """Gradients of the loss over all batches; returns it and the scale of the gradients."""
        if self._parallel is None:
            self._wrap_model()
        assert self._parallel is not None
        device = self.settings.device
        scale = self.settings.scaler.scale(torch.ones((), dtype=torch.float32, device=device))
        targets = [y if draw is None else mix_target(y, draw).a for _, y, draw in batches]
        weights = batch_weights(self.settings.criterion, targets, self.settings.world)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            is_last = i == len(batches) - 1
            loss_scale = weighted(scale, weight).to(scale.dtype)
            with nullcontext() if is_last else data_parallel.unsynchronised(self._parallel):
                loss = self._loss(self._parallel, batch, loss_scale)
                # as (loss * loss_scale).backward(), without the three kernels of the product
                loss.backward(loss_scale.to(loss.dtype).view_as(loss))
            if not is_last:
                self._accumulator.stash()
            total += weighted(loss.detach(), weight).float()
        self._accumulator.finish()
        return total, scale

    def _loss(self, model: nn.Module, batch: PreparedBatch, loss_scale: Tensor) -> Tensor:
        criterion, mixup = self.settings.criterion, self.settings.mixup
        inputs: Tensor = batch.images
        target: Tensor | MixedTarget = batch.labels
        if mixup is not None:
            inputs, target = mixup.apply(*batch)
        known = {}
        if isinstance(criterion, CrossEntropyLoss):  # its forward then writes the gradient too
            known["grad_scale"] = loss_scale
        loss: Tensor = criterion(model(inputs), target, **known)
        if loss.numel() != 1:
            raise ValueError(
                f"criterion: expected one loss for the batch, got shape {tuple(loss.shape)}; "
                'reduction="mean" gives it'
            )
        return loss

    def _update(self, loss: Tensor, scale: Tensor) -> StepOutput:
        optimizer, scaler = self.settings.optimizer, self.settings.scaler
        telemetry = self._telemetry
        if telemetry is not None:
            telemetry.before()
        scaler.step(optimizer)
        scaler.update()
        counts = {} if telemetry is None else telemetry.after()
        optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update(optimizer.found_inf)
        return StepOutput(
            loss,
            scale,
            optimizer.grad_norm,
            optimizer.found_inf,
            optimizer.applied_steps,
            optimizer.first_nonfinite,
            tuple(counts.values()),
        )
