"""The training loop, from the first batch to the saved state, in one file that reads top to bottom.

    trainer = Trainer(model, optimizer, criterion, schedule=schedule, scaler=scaler, mixup=mixup)
    trainer.fit(train_loader, val_loader, epochs=8)

Started by torchrun, with a process group, the same lines train data parallel.

Nothing in a step waits for the device. What a step decided (loss, norm, skipped or not) is copied
to the host in the background and read when the next step's backward has been queued: in time for
the learning rate of that next step, which follows the *applied* steps, and with work queued behind.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastmp import checkpoint, transfer
from fastmp.amp import GradScaler
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data.mixup import Mixup
from fastmp.distributed import data_parallel, rendezvous
from fastmp.distributed.fsdp import Shards
from fastmp.distributed.rendezvous import World
from fastmp.nn import CrossEntropyLoss
from fastmp.optim.base import FusedOptimizer
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import Schedule
from fastmp.training import cuda_graph, data_position, log, progress, rng, signals
from fastmp.training.ema import Average
from fastmp.training.evaluation import Evaluation, evaluate
from fastmp.training.log import Step
from fastmp.training.progress import EpochResult, NonFiniteLoss, Progress, RunStopped
from fastmp.training.step import Batch, Decided, Drawn, Stepper

__all__ = ["EpochResult", "Evaluation", "NonFiniteLoss", "RunStopped", "Trainer"]


class Trainer:
    """Trains a classifier; everything but the order of things is handed in.

    Args:
        model: maps (N, C, H, W) to logits (N, classes), already on its device and in its dtype.
        optimizer: one of ``fastmp.optim``.
        criterion: a loss of (logits, targets); ``fastmp.nn.CrossEntropyLoss`` where mixup is used.
        schedule: (lr, momentum) of the number of applied steps; None leaves both alone.
        scaler: the loss scale; None for none.
        mixup: turns (images, labels) into the model's input and mixed targets, and images alone
            into input for evaluation; None feeds the model what the loader gives.
        accumulate: batches whose gradients are averaged for one optimizer step; summed in fp32.
        ema: decay of an average of the weights, which evaluation then uses; None: no average.
        unfreeze: which layers train in which epoch; None leaves that alone.
        cuda_graph: replay whole steps as one CUDA graph; where that cannot be, the reason is
            printed and the steps run one kernel at a time.
        telemetry: count gradients flushed to zero and updates lost to rounding.
        shards: of a model that is split over the ranks, see ``fastmp.distributed.fsdp``; None:
            every rank has all of it.
        folder: where ``metrics.jsonl``, ``events/`` and ``checkpoints/`` go; None writes nothing.
        save_every: steps between checkpoints, besides those after every epoch; 0: only those.
        keep: newest checkpoints to keep, besides the best.
        progress: show a progress bar and a line per epoch.
        world: the processes that train together; None: all of the process group, if there is one.

    Raises:
        TypeError: an optimizer that is not fastmp's, or mixup with a loss that is not.
        ValueError: ``accumulate`` or ``keep`` below 1, ``save_every`` below 0, or ``shards`` with
            something that needs whole parameters.
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
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                "expected an optimizer from fastmp.optim, which reports what its steps decided, "
                f"got {type(optimizer).__name__}"
            )
        if mixup is not None and not isinstance(criterion, CrossEntropyLoss):
            raise TypeError(
                "mixup gives mixed targets, which fastmp.nn.CrossEntropyLoss takes, "
                f"got {type(criterion).__name__}"
            )
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        if save_every < 0:
            raise ValueError(f"save_every must be at least 0, got {save_every}")
        if shards is not None and (ema or unfreeze or cuda_graph or telemetry):
            raise ValueError(
                "ema, unfreeze, cuda_graph, telemetry: expected none of them with shards"
            )
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.schedule = schedule
        self.device = next(model.parameters()).device
        self.scaler = scaler or GradScaler(self.device.type, enabled=False)
        self.mixup = mixup
        self.accumulate = accumulate
        self.ema = None if ema is None else Average(model, ema)
        self.unfreeze = unfreeze
        self.shards = shards
        self.save_every = save_every
        self.world = rendezvous.current() if world is None else world
        self.progress = progress and self.world.is_first
        self.done = Progress()
        self._stepper = Stepper(
            model,
            optimizer,
            criterion,
            self.scaler,
            mixup,
            accumulate=accumulate,
            world=self.world,
            ema=self.ema,
            telemetry=telemetry,
            sharded=shards is not None,
        )
        self._wants_graph = cuda_graph
        self._applied = int(optimizer.applied_steps)
        self._last: Step | None = None
        self._pending: log.Record | None = None
        self._signal: Callable[[], int] = lambda: 0
        self._asked = 0  # the signal for which all ranks stop
        self._loader: Iterable[Batch] | None = None  # of fit
        self._loader_state: dict[str, Any] = {}  # of a checkpoint, until fit brings the loader
        self._epoch_start: dict[str, Any] = {}
        self._start_files(folder, keep)

    def _start_files(self, folder: str | os.PathLike[str] | None, keep: int) -> None:
        """The first rank writes; the others keep quiet."""
        self.folder = None if folder is None else Path(folder)
        ours = self.folder if self.world.is_first else None
        self.checkpoints = None if ours is None else Checkpoints(ours / "checkpoints", keep=keep)
        self._log = log.Log(ours)

    @property
    def step(self) -> int:
        """Attempted optimizer steps so far."""
        return self.done.step

    @property
    def epoch(self) -> int:
        """Finished epochs so far."""
        return self.done.epoch

    # ---- the loop ----

    def fit(
        self, train_loader: Iterable[Batch], val_loader: Iterable[Batch], epochs: int
    ) -> list[EpochResult]:
        """Train for ``epochs`` epochs, evaluating and saving after each.

        After ``resume`` the epoch that was interrupted is the first of them.

        Raises:
            RunStopped: the loss turned non-finite, more than 20 steps in a row were skipped, or the
                loss scale fell below 1. The state is saved first.
            KeyboardInterrupt: likewise; ``interrupts.Terminated`` for SIGTERM.
            ValueError: a loader without batches.
        """
        results: list[EpochResult] = []
        last = self.epoch + epochs
        self._loader = train_loader
        data_position.restore_own_state(train_loader, self._loader_state)
        self._loader_state = {}
        if self._wants_graph:
            self._record_steps(train_loader, epochs)
        try:
            with signals.deferred() as self._signal:
                while self.epoch < last:
                    results.append(self._epoch(train_loader, val_loader, last))
                    self._save_in_folder(score=results[-1].val_accuracy)
                    self._asked = self.world.max(self._signal())
                    self._stop_if_asked()
        except RunStopped as stopped:
            raise type(stopped)(f"{stopped}; {self._save_and_wait()}") from None
        except KeyboardInterrupt as stop:
            if self.world.size > 1 and not self._asked:
                raise  # the other ranks are in the middle of a step: nothing to save together
            with suppress(RunStopped):
                self._take_pending()
            how = "terminated" if isinstance(stop, signals.Terminated) else "interrupted"
            raise type(stop)(f"{how} at step {self.step}; {self._save_and_wait()}") from None
        finally:
            self._log.close()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return results

    def _epoch(
        self, train_loader: Iterable[Batch], val_loader: Iterable[Batch], last: int
    ) -> EpochResult:
        self._prepare_model()
        start = data_position.begin(train_loader, self.epoch, self.device)
        if self.done.batch == 0:
            self._epoch_start = start
        name = f"epoch {self.epoch + 1}/{last}"
        # disable=None: no bar where nobody looks (a file, a pipe)
        with tqdm(
            total=len(train_loader) if isinstance(train_loader, Sized) else None,
            initial=self.done.batch,
            desc=name,
            leave=False,
            disable=None if self.progress else True,
        ) as bar:
            self._walk(train_loader, bar)
            self._take_pending()
        if self.done.steps == 0:
            raise ValueError("train_loader gave no batches; expected at least one")
        evaluation = self.evaluate(val_loader)
        done = self.done
        result = EpochResult(
            epoch=done.epoch + 1,
            train_loss=done.loss / done.steps,
            val_loss=evaluation.loss,
            val_accuracy=evaluation.accuracy,
            seconds=done.seconds,
            samples_per_second=done.samples / done.seconds,
        )
        self.done = Progress(done.epoch + 1, done.step, skips_in_a_row=done.skips_in_a_row)
        self._log.write("epoch", step=self.step, **asdict(result))
        if self.progress:
            tqdm.write(f"{name:>11}  {result}")
        return result

    def _walk(self, loader: Iterable[Batch], bar: tqdm[Any]) -> None:
        """The rest of the epoch's steps."""
        batches = data_position.batches(loader, self.done.batch, self._epoch_start, self.device)
        before, started = self.done.seconds, time.perf_counter()
        for group in _groups(batches, self.accumulate):
            self.train_step(group)
            self.done.batch += len(group)
            self.done.samples += self.world.size * sum(len(labels) for _, labels in group)
            self.done.seconds = before + time.perf_counter() - started
            self._stop_if_asked()
            if self.save_every and self.step % self.save_every == 0:
                self._save_in_folder()
            bar.set_postfix_str(self._glance(), refresh=False)
            bar.update(len(group))

    def _prepare_model(self) -> None:
        """Training mode, and the layers that train in this epoch."""
        changed = self.unfreeze is not None and self.unfreeze.plan(self.model, self.epoch)
        transfer.train_mode(self.model)
        self._stepper.prepare(changed)

    def train_step(self, group: list[Batch]) -> None:
        """One optimizer step, on the mean loss over the batches of ``group``.

        What it decided is logged by the next step, or at the end of the epoch.

        Raises:
            ValueError: no batch, or more than ``accumulate``.
        """
        if not 1 <= len(group) <= self.accumulate:
            raise ValueError(f"expected 1 to {self.accumulate} batches, got {len(group)}")
        batches = [self._stepper.draw(*batch) for batch in group]
        decided = self._replayed(batches) if self._stepper.is_recording else None
        if decided is None:
            decided = self._stepper.step(batches, self._follow_schedule)
        self._take_pending()
        self.done.step += 1
        self._pending = log.Record(self.step, self._over_ranks(decided))

    def _follow_schedule(self) -> None:
        self._take_pending()  # says whether the step before was applied
        if self.schedule is not None:
            apply(self.optimizer, *self.schedule(self._applied))

    def _over_ranks(self, decided: Decided) -> Decided:
        """The loss averaged over the ranks, and with it whether any of them was asked to stop."""
        signal = self._signal()
        if self.world.size == 1:
            self._asked = signal
            return decided
        asked = torch.tensor(float(signal), device=self.device)
        shared = self.world.sum(torch.stack([decided["loss"], asked]))
        return {**decided, "loss": shared[0] / self.world.size, "signal": shared[1]}

    # ---- the step as a graph ----

    def _record_steps(self, loader: Iterable[Batch], epochs: int) -> None:
        """From now on steps are recorded and replayed, with the schedule on the device."""
        try:
            self._stepper.record()
            if self.schedule is not None:
                if not isinstance(loader, Sized):
                    raise cuda_graph.Unsupported("the loader has no length, the schedule needs one")
                steps = math.ceil(len(loader) / self.accumulate) * epochs
                self.optimizer.bind_schedule(self.schedule, self._applied + steps)
        except cuda_graph.Unsupported as reason:
            self._go_without_graph(reason)

    def _replayed(self, batches: list[Drawn]) -> Decided | None:
        try:
            return self._stepper.replay(batches)
        except cuda_graph.Unsupported as reason:
            self._go_without_graph(reason)
            return None

    def _go_without_graph(self, reason: cuda_graph.Unsupported) -> None:
        if self.world.is_first:
            tqdm.write(f"no CUDA graph: {reason}")
        self._wants_graph = False
        self._stepper.stop_recording()
        self.optimizer.clear_schedule()

    # ---- what a step decided ----

    def _take_pending(self) -> None:
        """Read and log the step before, and stop the run if it says so."""
        if self._pending is None:
            return
        values, number = self._pending.read(), self._pending.step
        self._pending = None
        self._asked = int(values.pop("signal", self._asked))
        self._applied, offender = (int(values.pop(name)) for name in ("applied", "offender"))
        skipped = values.pop("skipped") != 0
        step = Step(
            number,
            self._lr_of(self._applied - (not skipped)),
            skipped=skipped,
            **{name: values.pop(name) for name in ("loss", "scale", "grad_norm")},
        )
        self.done.skips_in_a_row = self.done.skips_in_a_row + 1 if skipped else 0
        self.done.loss += step.loss
        self.done.steps += 1
        self._last = step
        self._log.write("step", epoch=self.epoch + 1, **asdict(step))
        if skipped:
            self._log.write("overflow", step=number, parameter=self.optimizer.param_name(offender))
        if values:
            self._log.write("telemetry", step=number, **values)
        progress.stop_if_hopeless(step, self.done, self.optimizer.param_name(offender), self.world)

    def _lr_of(self, applied: int) -> float:
        """The learning rate of the step that came after so many applied ones."""
        if self.schedule is not None:
            return self.schedule(applied)[0]
        return float(self.optimizer.param_groups[0]["lr"])

    def _stop_if_asked(self) -> None:
        """Stop between two steps, for a signal that every rank knows of."""
        if self._asked:
            raise signals.reason(self._asked)

    def _stop_alone(self) -> None:
        """The same where there are no other ranks to agree with."""
        if self.world.size == 1:
            self._asked = self._signal()
            self._stop_if_asked()

    def last_loss(self) -> float:
        """The loss of the last step; waits for it.

        Raises:
            RuntimeError: there was none.
        """
        self._take_pending()
        if self._last is None:
            raise RuntimeError("there was no step yet")
        return self._last.loss

    def _glance(self) -> str:
        if self._last is None:
            return ""
        last, speed = self._last, self.done.samples / max(self.done.seconds, 1e-9)
        scale = f"  scale {last.scale:g}" if self.scaler.is_enabled() else ""
        return f"loss {last.loss:.3f}  lr {last.lr:.2e}{scale}  {speed:,.0f} samples/s"

    # ---- evaluation ----

    def evaluate(self, loader: Iterable[Batch]) -> Evaluation:
        """Loss (of ``criterion``) and accuracy over all samples of all ranks, without mixing.

        With an average of the weights, it is the average that is evaluated.

        Raises:
            ValueError: a loader without batches.
        """
        with self.ema.in_place() if self.ema is not None else nullcontext():
            if self.world.size > 1:  # each rank has seen other batches: the first one's count
                data_parallel.broadcast_buffers(self.model)
            return evaluate(
                self.model,
                loader,
                self.criterion,
                plain=self.mixup.plain if self.mixup is not None else None,
                world=self.world,
                after_batch=self._stop_alone,
                in_step=self.shards is not None,
            )

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every rank must ask for it."""
        own = {
            "rng": rng.state(self.device),
            "mixup": None if self.mixup is None else self.mixup.state_dict(),
            "epoch_start": self._epoch_start,
            "loader": data_position.own_state(self._loader),
        }
        if self.shards is None:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        else:
            model = self.shards.whole_model()
            optimizer = self.shards.whole_optimizer(self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "progress": asdict(self.done),
            "ranks": self.world.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the trainer that ``state`` was taken from would have, to the bit.

        With another number of ranks than it had, the random numbers are new ones.

        Raises:
            ValueError, RuntimeError: the state of another model, optimizer or scaler.
        """
        self._pending, self._last = None, None
        if self.shards is None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.shards.load_model(state["model"])
            self.shards.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.done = Progress(**state["progress"])
        self._applied = int(self.optimizer.applied_steps)
        if len(state["ranks"]) != self.world.size:
            self.done.batch = self.done.batch * len(state["ranks"]) // self.world.size
            return
        own = state["ranks"][self.world.rank]
        self._epoch_start = own["epoch_start"]
        self._loader_state = own["loader"]
        if self.mixup is not None and own["mixup"] is not None:
            self.mixup.load_state_dict(own["mixup"])
        rng.restore(own["rng"], self.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a checkpoint; see ``checkpoint.save``. Every rank must call it."""
        self._take_pending()
        state = self.state_dict()
        if self.world.is_first:
            checkpoint.save(path, state)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint: ``load_state_dict`` with what ``path`` holds.

        Raises:
            CheckpointError: it cannot be trusted; nothing has changed.
        """
        state = checkpoint.load(path) if self.world.is_first else None
        self.load_state_dict(self.world.broadcast_object(state))

    def resume_newest(self) -> bool:
        """Go on from the newest complete checkpoint in the folder, if there is one.

        Raises:
            CheckpointError: there are some, but none can be trusted.
        """
        state = None if self.checkpoints is None else self.checkpoints.load_newest()
        state = self.world.broadcast_object(state)
        if state is None:
            return False
        self.load_state_dict(state)
        self._log.rewind(self.step)
        self._log.write("resumed", step=self.step)
        return True

    def _save_in_folder(self, score: float | None = None) -> None:
        """In the background; the step that is on its way is in it."""
        if self.folder is None:
            return
        self._take_pending()
        state = self.state_dict()
        if self.checkpoints is not None:
            path = self.checkpoints.save(state, self.step, score)
            self._log.write("saved", step=self.step, path=path.name)

    def _save_and_wait(self) -> str:
        if self.folder is None:
            return "the state was not saved: the trainer has no folder"
        self._save_in_folder()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return f"the state is saved in {self.folder / 'checkpoints'}"


def _groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches in lists of ``size``; the last list holds what is left."""
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
