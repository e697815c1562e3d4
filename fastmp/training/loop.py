"""The epochs of a run: its steps, validations, checkpoints and lines on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from fastmp.training.evaluation import Evaluation
from fastmp.training.progress import EpochResult, RunStopped
from fastmp.training.settings import Settings
from fastmp.training.signals import StopSignal, Terminated
from fastmp.training.state import TrainState
from fastmp.training.step_log import StepLog

# Of 80 columns the text of a step takes 54 and "epoch 12/15 100%" 16; no it/s, which depends on the
# batch size.
_BAR = "{desc} {percentage:3.0f}% {bar} {postfix[0]}"
_WITHOUT_TOTAL = "{desc} {n_fmt} batches  {postfix[0]}"


class Loop:
    """Trains for epochs; ``Trainer`` documents arguments and errors.

    Args:
        settings: those of the trainer.
        state: the progress, which the loop advances, and the checkpoints.
        steps: the log of the steps, and the function that takes them.
        stop_signal: on which the loop stops.
        evaluate: the validation of a loader.
    """

    def __init__(
        self,
        settings: Settings,
        state: TrainState,
        steps: StepLog,
        stop_signal: StopSignal,
        evaluate: Callable[[Iterable[Any]], Evaluation],
    ) -> None:
        self._settings, self._state, self._step_fn = settings, state, steps.step_fn
        self._steps, self._stop_signal, self._evaluate = steps, stop_signal, evaluate

    def run(self, val_loader: Iterable[Any] | None, epochs: int) -> list[EpochResult]:
        """Train for ``epochs`` epochs with the loader of the state."""
        state, world = self._state, self._settings.world
        results: list[EpochResult] = []
        last = state.progress.epoch + epochs
        steps = state.remaining_steps(epochs)
        try:
            with state.held(), self._stop_signal.deferred(), self._step_fn.run(steps):
                while state.progress.epoch < last:
                    results.append(self._epoch(val_loader, last))
                    state.save_in_folder(score=results[-1].val_accuracy)
                    self._stop_signal.exchange()
        except RunStopped as stopped:
            raise type(stopped)(f"{stopped}; {self._save_and_wait()}") from None
        except KeyboardInterrupt as stop:
            if world.size > 1 and not self._stop_signal.agreed:
                raise  # the other ranks are within a step: there is no common state to save
            how = "terminated" if isinstance(stop, Terminated) else "interrupted"
            at = f"{how} at step {state.progress.step}"
            raise type(stop)(f"{at}; {self._save_and_wait()}") from None
        finally:
            state.log.close()
        state.wait()
        return results

    def _epoch(self, val_loader: Iterable[Any] | None, last: int) -> EpochResult:
        state, settings = self._state, self._settings
        self._step_fn.begin_epoch(state.progress.epoch)
        state.begin_epoch()
        name = f"epoch {state.progress.epoch + 1}/{last}"
        total, text = state.batches_an_epoch, [""]
        with tqdm(
            total=total, initial=state.progress.batch, desc=name, leave=False,
            bar_format=_BAR if total else _WITHOUT_TOTAL, postfix=text, dynamic_ncols=True,
            disable=None if settings.progress else True,  # None: only on a terminal
        ) as bar, state.saved_if_unreadable(self._save_and_wait):  # fmt: skip
            self._train_epoch(bar, text)
        if val_loader is None:
            result = state.progress.result(None)
        else:
            with state.saved_first():
                result = state.progress.result(self._evaluate(val_loader))
        state.progress = state.progress.next_epoch()
        state.log.write("epoch", step=state.progress.step, **asdict(result))
        if settings.progress:
            tqdm.write(f"{name:>11}  {result}")
        if settings.on_epoch is not None and settings.world.is_first:
            settings.on_epoch(result)
        return result

    def _train_epoch(self, bar: tqdm[Any], text: list[str]) -> None:
        """The remaining steps of the epoch; ``text`` becomes the last one, beside the bar."""
        state, settings = self._state, self._settings
        progress, save_every = state.progress, settings.save_every
        before, started = progress.seconds, time.perf_counter()
        for group in state.groups():
            self._steps.add(self._step_fn(group))
            self._steps.log_finished()
            progress.batch += len(group)
            progress.samples += settings.world.size * sum(len(labels) for _, labels in group)
            progress.seconds = before + time.perf_counter() - started
            self._stop_signal.raise_if_agreed()
            if save_every and progress.step % save_every == 0:
                self._steps.log_all()
                state.save_in_folder()
            text[0] = self._steps.progress_text()
            bar.update(len(group))
        self._steps.log_all()

    def _save_and_wait(self) -> str:
        with suppress(RunStopped):
            self._steps.log_all()
        if self._settings.folder is None:
            return "the state was not saved: the trainer has no folder"
        self._state.save_in_folder()
        self._state.wait()
        return f"the state is saved in {self._settings.folder / 'checkpoints'}"
