"""The training loop.

    trainer = Trainer(model, optimizer, criterion, schedule=schedule, scaler=scaler, mixup=mixup)
    trainer.fit(train_loader, val_loader, epochs=8)

Started by torchrun, with a process group, the same lines train data parallel.

Nothing in a step waits for the device. On a GPU the results of a step (loss, norm, skipped or not)
are copied to the host in the background, and read and logged when the next step is queued.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastmp import transfer
from fastmp.amp import GradScaler
from fastmp.data.mixup import Mixup
from fastmp.distributed import rendezvous
from fastmp.distributed.fsdp import Shards
from fastmp.distributed.rendezvous import World
from fastmp.optim.base import FusedOptimizer
from fastmp.schedule import Schedule
from fastmp.training.ema import EMA
from fastmp.training.evaluation import Evaluation, evaluate
from fastmp.training.progress import EpochResult, NonFiniteLoss, RunStopped
from fastmp.training.settings import Settings
from fastmp.training.signals import StopSignal, Terminated
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
        progress: show a progress bar and a line per epoch.
        world: the processes that train together; None: all of the process group, if there is one.

    Raises:
        TypeError: an optimizer that is not fastmp's, or mixup with a loss that is not.
        ValueError: ``accumulate`` or ``keep`` below 1, ``save_every`` below 0, ``shards`` with a
            setting that needs whole parameters, or, with several ranks, a model wrapped for them.
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
        progress: bool = True,
        world: World | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
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
            world=rendezvous.joined() if world is None else world,
        )
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.scaler, self.mixup, self.accumulate = settings.scaler, mixup, accumulate
        self.shards, self.folder, self.world = shards, settings.folder, settings.world
        self.progress = progress and self.world.is_first
        self.ema = None if ema is None else EMA(model, ema, optimizer)
        self._state = TrainState(settings, self.ema)
        self._log, self.checkpoints = self._state.log, self._state.checkpoints
        self._stop_signal = StopSignal(self.world)
        self._step_fn = TrainStep(settings, self.ema, self._state.place)
        self._step_fn.set_schedule(schedule)
        self._steps = StepLog(settings, self._state, self._step_fn, self._stop_signal)

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
        self, train_loader: Iterable[Batch], val_loader: Iterable[Batch], epochs: int
    ) -> list[EpochResult]:
        """Train for ``epochs`` epochs, evaluating and saving after each.

        After ``resume`` the first of them is the rest of the interrupted one. With several ranks a
        ``DataLoader`` is split: its batch size is that of a rank, rank 0 draws the order. Any other
        loader gives this rank's batches; an epoch ends on all ranks with the shortest.

        Raises:
            RunStopped: the loss turned non-finite, more than 20 steps in a row were skipped, or the
                loss scale fell below 1. The state is saved first, on a GPU one step later.
            KeyboardInterrupt: likewise; ``signals.Terminated`` for SIGTERM.
            DataError: a batch cannot be read; on one rank the state is saved first.
            ValueError: a loader without batches, or the same ones on several ranks.
        """
        results: list[EpochResult] = []
        last = self.epoch + epochs
        self._state.attach_loader(train_loader, self.schedule)
        steps = self._state.remaining_steps(epochs)
        try:
            with self._state.held(), self._stop_signal.deferred(), self._step_fn.run(steps):
                while self.epoch < last:
                    results.append(self._epoch(val_loader, last))
                    self._state.save_in_folder(score=results[-1].val_accuracy)
                    self._stop_signal.exchange()
        except RunStopped as stopped:
            raise type(stopped)(f"{stopped}; {self._save_and_wait()}") from None
        except KeyboardInterrupt as stop:
            if self.world.size > 1 and not self._stop_signal.agreed:
                raise  # the other ranks are within a step: there is no common state to save
            how = "terminated" if isinstance(stop, Terminated) else "interrupted"
            raise type(stop)(f"{how} at step {self.step}; {self._save_and_wait()}") from None
        finally:
            self._log.close()
        self._state.wait()
        return results

    def _epoch(self, val_loader: Iterable[Batch], last: int) -> EpochResult:
        self._step_fn.begin_epoch(self.epoch)
        self._state.begin_epoch()
        name = f"epoch {self.epoch + 1}/{last}"
        with tqdm(
            total=self._state.batches_an_epoch, initial=self._state.progress.batch, desc=name,
            leave=False, disable=None if self.progress else True,  # None: only on a terminal
        ) as bar, self._state.saved_if_unreadable(self._save_and_wait):  # fmt: skip
            self._train_epoch(bar)
        with self._state.saved_first():
            result = self._state.progress.result(self.evaluate(val_loader))
        self._state.progress = self._state.progress.next_epoch()
        self._log.write("epoch", step=self.step, **asdict(result))
        if self.progress:
            tqdm.write(f"{name:>11}  {result}")
        return result

    def _train_epoch(self, bar: tqdm[Any]) -> None:
        """The remaining steps of the epoch."""
        progress, save_every = self._state.progress, self.settings.save_every
        before, started = progress.seconds, time.perf_counter()
        for group in self._state.groups():
            self.train_step(group)
            progress.batch += len(group)
            progress.samples += self.world.size * sum(len(labels) for _, labels in group)
            progress.seconds = before + time.perf_counter() - started
            self._stop_signal.raise_if_agreed()
            if save_every and self.step % save_every == 0:
                self._steps.log_all()
                self._state.save_in_folder()
            bar.set_postfix_str(self._steps.progress_text(), refresh=False)
            bar.update(len(group))
        self._steps.log_all()

    def train_step(self, group: list[Batch]) -> None:
        """One optimizer step, on the batches of ``group`` and of the other ranks as one.

        On a GPU its results are logged by the next step, or at the end of the epoch.

        Raises:
            ValueError: no batch, or more than ``accumulate``.
        """
        self._steps.add(self._step_fn(group))
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

    def _save_and_wait(self) -> str:
        with suppress(RunStopped):
            self._steps.log_all()
        if self.folder is None:
            return "the state was not saved: the trainer has no folder"
        self._state.save_in_folder()
        self._state.wait()
        return f"the state is saved in {self.folder / 'checkpoints'}"

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
