"""One optimizer step, on the device alone: forward, loss, backward, exchange, update.

Nothing here waits for the device or asks what the step decided; that is what lets a whole step be
recorded as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastmp.amp.accumulation import Accumulator
from fastmp.amp.underflow import Telemetry
from fastmp.data.mixup import MixParams, Mixup
from fastmp.distributed import data_parallel
from fastmp.distributed.rendezvous import World
from fastmp.nn import CrossEntropyLoss
from fastmp.ops.loss import MixedTarget
from fastmp.optim.base import FusedOptimizer
from fastmp.training import cuda_graph
from fastmp.training.ema import Average

Batch = tuple[Tensor, Tensor]
Drawn = tuple[Tensor, Tensor, MixParams | None]  # a batch on its device, and what to mix it with
Decided = dict[str, Tensor]  # 0-d tensors on the device, by name


class Stepper:
    """Takes steps; the arguments are those of ``fastmp.Trainer``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        criterion: nn.Module,
        scaler: torch.amp.GradScaler,
        mixup: Mixup | None,
        *,
        accumulate: int,
        world: World,
        ema: Average | None,
        telemetry: bool,
        sharded: bool,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.scaler = scaler
        self.mixup = mixup
        self.accumulate = accumulate
        self.world = world
        self.ema = ema
        self.sharded = sharded
        self.device = next(model.parameters()).device
        self.telemetry = Telemetry(optimizer) if telemetry else None
        self._accumulator = Accumulator(p for g in optimizer.param_groups for p in g["params"])
        self._parallel: nn.Module | None = None  # the model as training calls it
        self._graph: cuda_graph.Graphed | None = None

    def prepare(self, changed: bool) -> None:
        """Get ready for an epoch in which other layers train than before, if ``changed``."""
        if self._parallel is not None and not changed:
            return
        self._parallel = self.model
        if self.world.size > 1 and not self.sharded:
            self._parallel = data_parallel.parallel(
                self.model, self._accumulator, static=self.accumulate == 1
            )
        if self._graph is not None:
            self._graph.forget()

    def record(self) -> None:
        """From now on record steps and replay them.

        Raises:
            graph.Unsupported: this device has no graphs.
        """
        warmup = cuda_graph.WARMUP if self.world.size == 1 else cuda_graph.WARMUP_PARALLEL
        self._graph = cuda_graph.Graphed(
            lambda b: self._update(*self._backward(b)), self.device, warmup
        )

    def stop_recording(self) -> None:
        """Back to one kernel at a time, without what a recording that failed left behind."""
        self._graph = None
        self.optimizer.zero_grad()
        self._accumulator.clear()

    @property
    def is_recording(self) -> bool:
        """Whether ``replay`` is to be called rather than ``step``."""
        return self._graph is not None

    def draw(self, images: Tensor, labels: Tensor) -> Drawn:
        """A batch on its way to the device, and what mixup drew for it."""
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        return images, labels, None if self.mixup is None else self.mixup.draw(images)

    def step(self, batches: list[Drawn], before_update: Callable[[], None]) -> Decided:
        """One optimizer step on the mean loss over ``batches``.

        Args:
            batches: as ``draw`` gave them.
            before_update: called when the backward is queued, to set hyperparameters.

        Returns:
            what it decided: "loss", "scale" (of the gradients), "grad_norm", "skipped" (0 or 1),
            "applied" (steps so far), "offender", and what the telemetry counted.
        """
        loss, scale = self._backward(batches)
        before_update()
        return self._update(loss, scale)

    def replay(self, batches: list[Drawn]) -> Decided:
        """The same as a CUDA graph, with the hyperparameters that lie on the device.

        Raises:
            graph.Unsupported: the step cannot be recorded, and has not been taken.
        """
        assert self._graph is not None
        decided: Decided = self._graph(batches)
        return decided

    def _backward(self, batches: list[Drawn]) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss; the loss, and the scale that the gradients carry."""
        if self._parallel is None:
            self.prepare(changed=True)
        assert self._parallel is not None
        scale = self.scaler.scale(torch.ones((), device=self.device))
        # What the backward multiplies each loss's gradient with. The last group of an epoch may be
        # short, so it is divided by what it holds, not by what it could hold.
        share = scale / len(batches)
        total = torch.zeros((), device=self.device)
        for i, (images, labels, draw) in enumerate(batches):
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else data_parallel.unsynchronised(self._parallel):
                inputs, target = self._mixed(images, labels, draw)
                loss = self._loss(self._parallel(inputs), target, share)
                (loss * share).backward()
            if not is_last:
                self._accumulator.stash()
            total += loss.detach() / len(batches)
        self._accumulator.finish()
        return total, scale

    def _mixed(
        self, images: Tensor, labels: Tensor, draw: MixParams | None
    ) -> tuple[Tensor, Tensor | MixedTarget]:
        return (images, labels) if self.mixup is None else self.mixup.apply(images, labels, draw)

    def _loss(self, logits: Tensor, target: Tensor | MixedTarget, share: Tensor) -> Tensor:
        if isinstance(self.criterion, CrossEntropyLoss):
            # told the incoming gradient, it writes its own in the pass that reads the logits
            loss: Tensor = self.criterion(logits, target, grad_scale=share)
        else:
            loss = self.criterion(logits, target)
        return loss

    def _update(self, loss: Tensor, scale: Tensor) -> Decided:
        if self.telemetry is not None:
            self.telemetry.before()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        counts = {} if self.telemetry is None else self.telemetry.after()
        optimizer = self.optimizer
        optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(optimizer.found_inf)
        return {
            "loss": loss,
            "scale": scale,
            "grad_norm": optimizer.grad_norm,
            "skipped": optimizer.found_inf,
            "applied": optimizer.applied_steps,
            "offender": optimizer.first_nonfinite,
            **counts,
        }
