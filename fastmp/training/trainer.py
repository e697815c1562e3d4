"""The training loop.

    trainer = Trainer(model, optimizer, criterion, schedule=schedule, scaler=scaler, mixup=mixup)
    trainer.fit(train_loader, val_loader, epochs=8)

Started by torchrun, with a process group, the same lines train data parallel.

Nothing in a step waits for the device. On a GPU the results of a step (loss, norm, skipped or not)
are copied to the host in the background, and read and logged when the next step is queued.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmp import transfer
from fastmp.amp import GradScaler
from fastmp.data.mixup import Mixup
from fastmp.distributed import rendezvous
from fastmp.distributed.fsdp import Shards
from fastmp.distributed.rendezvous import World
from fastmp.optim.base import FusedOptimizer
from fastmp.schedule import Schedule
from fastmp.training import log
from fastmp.training.batches import Prepare, as_pair
from fastmp.training.ema import EMA
from fastmp.training.evaluation import Evaluation, evaluate
from fastmp.training.loop import Loop
from fastmp.training.progress import EpochResult, NonFiniteLoss, RunStopped, StepResult
from fastmp.training.results import Results, facts
from fastmp.training.settings import Settings
from fastmp.training.signals import StopSignal
from fastmp.training.state import TrainState
from fastmp.training.step import Batch, TrainStep
from fastmp.training.step_log import StepLog

__all__ = ["EpochResult", "Evaluation", "NonFiniteLoss", "RunStopped", "Trainer"]


class Trainer:
    """Trains a classifier.

    Args:
        model: maps (N, C, H, W) to logits (N, classes), already on its device and in its dtype.
        optimizer: one of ``fastmp.optim``.
        criterion: a loss of (logits, targets); ``fastmp.nn.CrossEntropyLoss`` where mixup is used.
        schedule: (lr, momentum) as a pure function of the applied steps; None leaves both alone.
        scaler: the loss scale; None for none.
        mixup: turns (images, labels) into the model's input and mixed targets, and images alone
            into input for evaluation; None: the model takes the batches unchanged.
        accumulate: batches of one optimizer step, which with those of the other ranks count as one
            batch, whatever their sizes (``amp.accumulation.batch_weights``); summed in fp32.
        ema: decay of an average of the weights, which evaluation then uses; None: no average.
        unfreeze: which layers train in which epoch; None leaves that alone.
        cuda_graph: replay whole steps as CUDA graphs; where that is impossible, print why.
        telemetry: count gradients flushed to zero and updates lost to rounding.
        shards: of a model split over the ranks by ``fastmp.distributed.fsdp``; None: it is whole.
        folder: of metrics.jsonl, events/ and checkpoints/, one run's at a time; None: no files.
        save_every: steps between checkpoints, besides those after every epoch; 0: only those.
        keep: newest checkpoints to keep, besides the best.
        prepare_batch: makes (images, labels) of what the loaders give; by default pairs and
            dictionaries with the usual names are taken.
        on_step, on_epoch: called with the results of a step, on a GPU one step later, and of an
            epoch, on the first rank: ``on_epoch=lambda epoch: wandb.log(asdict(epoch))``.
        report: write curves.png and report.html into the folder when ``fit`` ends.
        progress: show a progress bar and a line per epoch.
        world: the processes that train together; None: all of the process group, if there is one.

    Raises:
        TypeError: an optimizer that is not fastmp's, or mixup with a loss that is not.
        ValueError: ``accumulate`` or ``keep`` below 1, ``save_every`` below 0, ``report`` without a
            folder, fp16 weights without an enabled scaler, ``shards`` with a setting that needs
            whole parameters, or, with several ranks, a model wrapped for them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        criterion: nn.Module,
        *,
        schedule: Schedule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mixup: Mixup | None = None,
        accumulate: int = 1,
        ema: float | None = None,
        unfreeze: transfer.GradualUnfreezing | None = None,
        cuda_graph: bool = False,
        telemetry: bool = False,
        shards: Shards | None = None,
        folder: str | os.PathLike[str] | None = None,
        save_every: int = 0,
        keep: int = 2,
        prepare_batch: Prepare = as_pair,
        on_step: Callable[[StepResult], object] | None = None,
        on_epoch: Callable[[EpochResult], object] | None = None,
        report: bool = False,
        progress: bool = True,
        world: World | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        world = rendezvous.joined() if world is None else world
        self.settings = settings = Settings(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            scaler=scaler or GradScaler(self.device.type, enabled=False),
            mixup=mixup,
            accumulate=accumulate,
            ema=ema,
            unfreeze=unfreeze,
            cuda_graph=cuda_graph,
            telemetry=telemetry,
            shards=shards,
            folder=None if folder is None else Path(folder),
            save_every=save_every,
            keep=keep,
            prepare_batch=prepare_batch,
            on_step=on_step,
            on_epoch=on_epoch,
            report=report,
            progress=progress and world.is_first,
            world=world,
        )
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.scaler, self.mixup, self.accumulate = settings.scaler, mixup, accumulate
        self.shards, self.folder, self.world = shards, settings.folder, world
        self.ema = None if ema is None else EMA(model, ema, optimizer, shards)
        self._state = TrainState(settings, self.ema)
        self.checkpoints = self._state.checkpoints
        self._stop_signal = StopSignal(self.world)
        self._step_fn = TrainStep(settings, self.ema, self._state.place)
        self._step_fn.set_schedule(schedule)
        self._steps = StepLog(settings, self._state, self._step_fn, self._stop_signal)
        self._loop = Loop(settings, self._state, self._steps, self._stop_signal, self.evaluate)

    @property
    def schedule(self) -> Schedule | None:
        """(lr, momentum) of the applied steps; may be set between two steps."""
        return self._step_fn.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._step_fn.set_schedule(schedule)

    @property
    def step(self) -> int:
        """Attempted optimizer steps so far."""
        return self._state.progress.step

    @property
    def epoch(self) -> int:
        """Finished epochs so far."""
        return self._state.progress.epoch

    # ---- the loop ----

    def fit(
        self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None, epochs: int = 1
    ) -> Results:
        """Train for ``epochs`` epochs, evaluating and saving after each.

        After ``resume`` the first of them is the rest of the interrupted one. With several ranks a
        ``DataLoader`` is split: its batch size is that of a rank, rank 0 draws the order. Any other
        loader gives this rank's batches; an epoch ends on all ranks with the shortest.

        Args:
            train_loader: of batches that ``prepare_batch`` takes.
            val_loader: likewise; None: no validation.
            epochs: to train, besides those that are finished.

        Returns:
            the epochs, a list; printed, they show the run in short as ``fastmp train`` does.

        Raises:
            RunStopped: the loss turned non-finite, more than 20 steps in a row were skipped, or the
                loss scale fell below 1. The state is saved first, on a GPU one step later.
            KeyboardInterrupt: likewise; ``signals.Terminated`` for SIGTERM.
            DataError: a batch cannot be read; on one rank the state is saved first.
            ValueError: a loader without batches, or the same ones on several ranks.
        """
        self._state.attach_loader(train_loader, self.schedule)
        results = Results(self._loop.run(val_loader, epochs))
        results.facts = self.facts(results)
        if self.settings.report and self.world.is_first:
            from fastmp.report.run import write_of_trainer  # which imports this module

            write_of_trainer(self, val_loader)
        return results

    def facts(self, epochs: Sequence[EpochResult] = ()) -> dict[str, str]:
        """The run in short, by name: from its log, or without a folder from ``epochs``."""
        rows = [asdict(epoch) for epoch in epochs]
        if self.folder is not None and self.world.is_first:
            rows = log.read(self.folder / log.FILE, "epoch")
        return facts(rows, self.model, int(self.optimizer.skipped_steps), self.step)

    def train_step(self, group: list[Batch]) -> None:
        """One optimizer step, on the batches of ``group`` and of the other ranks as one.

        On a GPU its results are logged by the next step, or at the end of the epoch.

        Raises:
            ValueError: no batch, or more than ``accumulate``.
        """
        self._steps.add(self._step_fn([self.settings.prepare_batch(batch) for batch in group]))
        self._steps.log_finished()

    def last_loss(self) -> float:
        """The loss of the last step; waits for it.

        Raises:
            RuntimeError: there was none.
        """
        return self._steps.last_loss()

    def evaluate(self, loader: Iterable[Batch]) -> Evaluation:
        """Loss (of ``criterion``) and accuracy over all samples of all ranks, without mixing.

        With an average of the weights, it is the average that is evaluated.

        Raises:
            ValueError: a loader without batches.
        """
        with self.ema.swapped_in() if self.ema is not None else nullcontext():
            return evaluate(self.settings, loader, self._stop_signal.poll)

    # ---- state: every rank must call these ----

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on."""
        return self._state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as the trainer that ``state`` was taken from would have, to the bit.

        With other ranks random numbers are new; with other batches the rest takes the schedule's.

        Raises:
            ValueError, RuntimeError: the state of another model, optimizer or scaler.
        """
        self._steps.clear()
        self._state.load_state_dict(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a checkpoint; see ``checkpoint.save``."""
        self._steps.log_all()
        self._state.save(path)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue from the checkpoint at ``path``, as ``load_state_dict`` does.

        Raises:
            CheckpointError: it is damaged; nothing has changed.
        """
        self._state.load(path)
        self._steps.clear()

    def resume_newest(self) -> bool:
        """Continue from the newest complete checkpoint in the folder, if there is one.

        Raises:
            CheckpointError: there are some, all of them damaged.
        """
        if found := self._state.load_newest():
            self._steps.clear()
        return found
