"""The results of steps, from the device to the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from fastmp.amp import underflow
from fastmp.optim.lr_scheduler import apply
from fastmp.schedule import evaluate
from fastmp.training.progress import StepResult, raise_if_diverged
from fastmp.training.settings import Settings
from fastmp.training.signals import StopSignal
from fastmp.training.state import TrainState
from fastmp.training.step import StepOutput, TrainStep


class Record:
    """A step's results, copied to the host in the background; ``read`` waits for this copy only.

    Args:
        step: number of the attempted step, from 1.
        values: 0-d tensors on one device.
    """

    def __init__(self, step: int, values: Sequence[Tensor]) -> None:
        self.step = step
        self._values = torch.stack([value.detach().double() for value in values])
        self._copied: torch.cuda.Event | None = None
        if self._values.is_cuda:
            host = torch.empty(len(values), dtype=torch.float64, device="cpu", pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values as numbers, in their order."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


class StepLog:
    """Logs steps, and stops a run that diverged.

    On a CPU a step is logged when it has run. On a GPU it is logged when the next one is queued:
    its results are copied in the background, and the device is never idle while the host reads.
    """

    def __init__(
        self, settings: Settings, state: TrainState, step_fn: TrainStep, stop_signal: StopSignal
    ) -> None:
        self._settings = settings
        self._state = state
        self.step_fn = step_fn
        self._stop_signal = stop_signal
        self._in_flight = int(settings.device.type == "cuda")
        self._records: deque[Record] = deque()
        self._last: StepResult | None = None

    def add(self, output: StepOutput) -> None:
        """Count the newest step and take its results; every rank must call it.

        With several ranks the loss becomes their mean, and a signal to any rank reaches all.
        """
        values, world = [*output[:-1], *output.telemetry], self._settings.world
        received = self._stop_signal.received
        if world.size == 1:
            self._stop_signal.agreed = received
        else:
            own = torch.stack([output.loss, torch.full_like(output.loss, received)])
            loss, signals = world.sum(own)
            values = [loss / world.size, *values[1:], signals]
        self._state.progress.step += 1
        self._records.append(Record(self._state.progress.step, values))

    def log_finished(self) -> None:
        """Log all steps but one that a GPU may still be working on; raises ``RunStopped``."""
        self._log_steps(self._in_flight)

    def log_all(self) -> None:
        """Log all steps, and wait for them; raises ``RunStopped``."""
        self._log_steps(0)

    def last_loss(self) -> float:
        """The loss of the newest step; waits for it."""
        self.log_all()
        if self._last is None:
            raise RuntimeError("there was no step yet")
        return self._last.loss

    def progress_text(self) -> str:
        """The last step, for the progress bar."""
        last, progress = self._last, self._state.progress
        if last is None:
            return ""
        speed = progress.samples / max(progress.seconds, 1e-9)
        scale = f"  scale {last.scale:g}" if self._settings.scaler.is_enabled() else ""
        return f"loss {last.loss:.3f}  lr {last.lr:.2e}{scale}  {speed:,.0f} samples/s"

    def clear(self) -> None:
        """Drop all steps."""
        self._records.clear()
        self._last = None

    def _log_steps(self, in_flight: int) -> None:
        while len(self._records) > in_flight:
            self._log_step(self._records.popleft())

    def _log_step(self, record: Record) -> None:
        values, progress, log = record.read(), self._state.progress, self._state.log
        if self._settings.world.size > 1:
            self._stop_signal.agreed = int(values.pop())
        loss, scale, grad_norm, skipped, applied, first_nonfinite, *counts = values
        lr = self._lr_of(int(applied) - (not skipped))
        self._last = step = StepResult(record.step, lr, loss, scale, grad_norm, bool(skipped))
        progress.skips_in_a_row = progress.skips_in_a_row + 1 if skipped else 0
        progress.loss += loss
        progress.steps += 1
        log.write("step", epoch=progress.epoch + 1, **asdict(step))
        parameter = self._settings.optimizer.param_name(int(first_nonfinite))
        if self._settings.on_step is not None and self._settings.world.is_first:
            self._settings.on_step(step)
        if skipped:
            log.write("overflow", step=step.step, parameter=parameter)
        if counts:
            named = dict(zip(underflow.NAMES, counts, strict=True))
            log.write("telemetry", step=step.step, **named)
        raise_if_diverged(step, progress, parameter, self._settings.world)

    def _lr_of(self, applied: int) -> float:
        """The learning rate of the step that followed ``applied`` applied ones."""
        optimizer, schedule = self._settings.optimizer, self.step_fn.followed
        if schedule is None:
            return optimizer.lr_after(applied)
        lr, momentum = evaluate(schedule, applied)
        if not self._records:  # the groups, and so a checkpoint, show the newest step's values
            apply(optimizer, lr, momentum)
            optimizer.accept_group_rates()
        return lr
