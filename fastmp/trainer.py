"""The training loop, from the first batch to the saved state, in one file that reads top to bottom.

    trainer = Trainer(model, optimizer, criterion, schedule=schedule, scaler=scaler, mixup=mixup)
    trainer.fit(train_loader, val_loader, epochs=8)

Nothing in a step waits for the device. What a step decided (loss, norm, skipped or not) is copied
to the host in the background and read when the next step's backward has been queued: in time for
the learning rate of that next step, which follows the *applied* steps, and with work queued behind.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmp import checkpoint, interrupts, metrics
from fastmp.amp import GradScaler
from fastmp.fused import Fused
from fastmp.metrics import Step
from fastmp.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.ops.loss import MixedTarget
from fastmp.schedule import Schedule, apply

Batch = tuple[Tensor, Tensor]

MAX_SKIPS_IN_A_ROW = 20  # 65536 backs off to 0.06 in 20 halvings: it is not the scale
MIN_SCALE = 1.0  # below, the scale no longer saves small gradients, it loses them


class RunStopped(RuntimeError):
    """Training cannot go on; the message says at which step, why, and where the state was saved."""


class NonFiniteLoss(RunStopped):
    """The loss, before any scaling, was infinite or not a number."""


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per sample, and the share of samples whose largest logit is the right one."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class EpochResult:
    """One epoch: its number from 1, losses, accuracy in [0, 1], seconds of training, speed."""

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float
    samples_per_second: float


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
        accumulate: batches whose gradients are averaged for one optimizer step.
        folder: where ``metrics.jsonl`` and ``checkpoint/`` go; None writes nothing.
        progress: show a progress bar and a line per epoch.

    Raises:
        TypeError: an optimizer that is not fastmp's, or mixup with a loss that is not.
        ValueError: ``accumulate`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Fused,
        criterion: nn.Module,
        *,
        schedule: Schedule | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mixup: Mixup | None = None,
        accumulate: int = 1,
        folder: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(optimizer, Fused):
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
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.schedule = schedule
        self.device = next(model.parameters()).device
        self.scaler = scaler or GradScaler(self.device.type, enabled=False)
        self.mixup = mixup
        self.accumulate = accumulate
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.epoch = 0  # finished
        self.step = 0  # attempted
        self._applied = int(optimizer.applied_steps)
        self._skips_in_a_row = 0
        self._steps: list[Step] = []  # of this epoch
        self._pending: metrics.Record | None = None
        self._check_interrupt: Callable[[], None] = lambda: None
        self._log = metrics.Log(self.folder and self.folder / metrics.FILE)

    # ---- the loop ----

    def fit(
        self, train_loader: Iterable[Batch], val_loader: Iterable[Batch], epochs: int
    ) -> list[EpochResult]:
        """Train for ``epochs`` epochs, evaluating and saving after each.

        Raises:
            RunStopped: the loss turned non-finite, more than 20 steps in a row were skipped, or the
                loss scale fell below 1. The state is saved first.
            KeyboardInterrupt: likewise.
            ValueError: a loader without batches.
        """
        results: list[EpochResult] = []
        last = self.epoch + epochs
        try:
            with interrupts.deferred() as self._check_interrupt:
                while self.epoch < last:
                    results.append(self._epoch(train_loader, val_loader, last))
                    self._save_in_folder()
        except RunStopped as stopped:
            raise type(stopped)(f"{stopped}; {self._save_in_folder()}") from None
        except KeyboardInterrupt:
            with suppress(RunStopped):
                self._take_pending()
            where = f"interrupted at step {self.step}; {self._save_in_folder()}"
            raise KeyboardInterrupt(where) from None
        return results

    def _epoch(
        self, train_loader: Iterable[Batch], val_loader: Iterable[Batch], last: int
    ) -> EpochResult:
        self.model.train()
        batches = len(train_loader) if isinstance(train_loader, Sized) else None
        self._steps.clear()
        samples, started = 0, time.perf_counter()
        name = f"epoch {self.epoch + 1}/{last}"
        # disable=None: no bar where nobody looks (a file, a pipe)
        with tqdm(
            total=batches, desc=name, leave=False, disable=None if self.progress else True
        ) as bar:
            for group in _groups(train_loader, self.accumulate):
                self.train_step(group)
                self._check_interrupt()
                samples += sum(len(labels) for _, labels in group)
                speed = samples / (time.perf_counter() - started)
                bar.set_postfix_str(self._glance(speed), refresh=False)
                bar.update(len(group))
            self._take_pending()
        if not self._steps:
            raise ValueError("train_loader gave no batches; expected at least one")
        seconds = time.perf_counter() - started
        evaluation = self.evaluate(val_loader)
        self.epoch += 1
        result = EpochResult(
            epoch=self.epoch,
            train_loss=sum(step.loss for step in self._steps) / len(self._steps),
            val_loss=evaluation.loss,
            val_accuracy=evaluation.accuracy,
            seconds=seconds,
            samples_per_second=samples / seconds,
        )
        self._log.write("epoch", step=self.step, **asdict(result))
        if self.progress:
            tqdm.write(f"{name:>11}  {_summary(result)}")
        return result

    def train_step(self, group: list[Batch]) -> None:
        """One optimizer step, on the mean loss over the batches of ``group``.

        What it decided is logged by the next step, or at the end of the epoch.
        """
        one = torch.ones((), device=self.device)
        scale = self.scaler.scale(one)
        # What the backward multiplies each loss's gradient with. The last group of an epoch may be
        # short, so it is divided by what it holds, not by what it could hold.
        share = scale / len(group)
        total = torch.zeros((), device=self.device)
        for images, labels in group:
            inputs, target = self._mixed(images.to(self.device), labels.to(self.device))
            loss = self._loss(self.model(inputs), target, share)
            (loss * share).backward()
            total += loss.detach() / len(group)
        self._take_pending()
        lr = self._follow_schedule()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self._pending = metrics.Record(self.step, lr, total, scale, self.optimizer)

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | MixedTarget]:
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def _loss(self, logits: Tensor, target: Tensor | MixedTarget, share: Tensor) -> Tensor:
        if isinstance(self.criterion, CrossEntropyLoss):
            # told the incoming gradient, it writes its own in the pass that reads the logits
            loss: Tensor = self.criterion(logits, target, grad_scale=share)
        else:
            loss = self.criterion(logits, target)
        return loss

    def _follow_schedule(self) -> float:
        if self.schedule is not None:
            apply(self.optimizer, *self.schedule(self._applied))
        return float(self.optimizer.param_groups[0]["lr"])

    def _take_pending(self) -> None:
        """Read and log the step before, and stop the run if it says so."""
        if self._pending is None:
            return
        step = self._pending.read()
        self._pending = None
        self._applied = step.applied
        self._skips_in_a_row = self._skips_in_a_row + 1 if step.skipped else 0
        self._steps.append(step)
        row = asdict(step)
        del row["applied"]
        self._log.write("step", epoch=self.epoch + 1, **row)
        if not math.isfinite(step.loss):
            raise NonFiniteLoss(
                f"stopped at step {step.step}: the loss is {step.loss} (lr {step.lr:.3g}); "
                "lower the lr, or look for bad values in the data"
            )
        if self._skips_in_a_row > MAX_SKIPS_IN_A_ROW:
            raise RunStopped(
                f"stopped at step {step.step}: {self._skips_in_a_row} steps in a row had "
                f"non-finite gradients, the first in parameter {self.optimizer.last_overflow()!r}; "
                "lower the lr"
            )
        if step.scale < MIN_SCALE:
            raise RunStopped(
                f"stopped at step {step.step}: the loss scale fell to {step.scale:g}, below "
                f"{MIN_SCALE:g}; lower the lr, or train in bf16 or fp32"
            )

    def _glance(self, speed: float) -> str:
        if not self._steps:
            return ""
        last = self._steps[-1]
        scale = f"  scale {last.scale:g}" if self.scaler.is_enabled() else ""
        return f"loss {last.loss:.3f}  lr {last.lr:.2e}{scale}  {speed:,.0f} samples/s"

    # ---- evaluation and state ----

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch]) -> Evaluation:
        """Loss (of ``criterion``) and accuracy over all samples, without mixing.

        Raises:
            ValueError: a loader without batches.
        """
        training = self.model.training
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        samples = 0
        for images, labels in loader:
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.model(images if self.mixup is None else self.mixup.plain(images))
            loss += self.criterion(logits, labels).double() * len(labels)
            right += (logits.argmax(1) == labels).sum()
            samples += len(labels)
            self._check_interrupt()
        self.model.train(training)
        if samples == 0:
            raise ValueError("the loader gave no batches; expected at least one")
        return Evaluation(float(loss) / samples, int(right) / samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write model, optimizer, scaler and progress as a checkpoint; see ``checkpoint.save``."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {"epoch": self.epoch, "step": self.step},
        }
        checkpoint.save(path, state)

    def _save_in_folder(self) -> str:
        if self.folder is None:
            return "the state was not saved: the trainer has no folder"
        self.save(self.folder / "checkpoint")
        return f"the state is saved in {self.folder / 'checkpoint'}"


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


def _summary(result: EpochResult) -> str:
    return (
        f"train loss {result.train_loss:.4f}  val loss {result.val_loss:.4f}  "
        f"accuracy {result.val_accuracy:.2%}  {result.seconds:.1f} s  "
        f"{result.samples_per_second:,.0f} samples/s"
    )
