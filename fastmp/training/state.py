"""The saved state of a run: everything that the rest of the run depends on.

    model, optimizer, scaler, ema, progress,
    schedule, batches_an_epoch, param_index      the same on all ranks
    ranks: rng, mixup, epoch_start, loader       one entry a rank

A run that is killed and resumed ends with the bits of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fastmp import checkpoint, files
from fastmp.checkpoint import CheckpointError, weights
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data import DataError
from fastmp.data.loader import Loader
from fastmp.schedule import Schedule
from fastmp.training import data_position, rng
from fastmp.training.ema import EMA
from fastmp.training.log import Log
from fastmp.training.progress import Progress
from fastmp.training.schedule_place import SchedulePlace
from fastmp.training.settings import Settings
from fastmp.training.step import Batch


class TrainState:
    """The progress of a run, its position in the data, and its checkpoints.

    Every rank must call the methods that save and load; ``Trainer`` documents their errors.
    """

    def __init__(self, settings: Settings, ema: EMA | None) -> None:
        folder = settings.folder if settings.world.is_first else None
        self.log = Log(folder)
        self.checkpoints: Checkpoints | None = None
        if folder is not None:
            self.checkpoints = Checkpoints(folder / "checkpoints", keep=settings.keep)
        self.progress = Progress()
        self.place = SchedulePlace()
        self._batches: int | None = None  # an epoch, of the rank with the fewest
        self._resumed = False  # since the last run
        self._settings = settings
        self._ema = ema
        self._loader: Iterable[Batch] = ()
        self._loader_state: dict[str, Any] = {}  # of a checkpoint, until the loader is known
        self._epoch_start: dict[str, Any] = {}
        self._knows_ranks = False  # each rank has its own batches
        self._warned = False  # that the ranks have unequally many

    # ---- the position in the data ----

    def attach_loader(self, loader: Iterable[Batch], schedule: Schedule | None) -> None:
        """Train with the batches of ``loader``, whose own generators belong to the state.

        With several ranks each gets its own batches: the loader is split if it can be. If an epoch
        had another number of batches, its position and that in the schedule stay the same share.
        """
        self._loader = self._settings.split(loader, training=True)
        # a class of the caller's may draw batches in its own way: they are compared
        self._knows_ranks = self._loader is not loader and type(loader) in (DataLoader, Loader)
        data_position.restore_own_state(self._loader, self._loader_state)
        self._loader_state = {}
        former, self._batches = self._batches, self._common_batches()
        steps = None if self._batches is None else self._steps_of(self._batches)
        length = getattr(schedule, "length", None)
        if self._resumed:
            if former and self._batches and former != self._batches:
                self.progress.batch = self.progress.batch * self._batches // former
            self.place.move(steps, length, int(self._settings.optimizer.applied_steps))
        self._resumed = False
        self.place.steps_per_epoch, self.place.length = steps, length

    def _steps_of(self, batches: int) -> int:
        return math.ceil(batches / self._settings.accumulate)

    @property
    def batches_an_epoch(self) -> int | None:
        """Of this rank; None if the loader has no length."""
        if not isinstance(self._loader, Sized):
            return None
        try:
            return len(self._loader)
        except TypeError:  # a DataLoader has one, unless its data set has none
            return None

    def _common_batches(self) -> int | None:
        """The batches an epoch of the rank with the fewest; None if one has no length."""
        counts = self._settings.world.gather(self.batches_an_epoch)
        if None in counts:
            return None
        self._warn_if_unequal(counts)
        return int(min(counts))

    def _warn_if_unequal(self, counts: list[int]) -> None:
        """Say that batches of some ranks are left out; once a run."""
        if min(counts) < max(counts) and self._settings.world.is_first and not self._warned:
            self._warned = True
            warnings.warn(
                f"the ranks have {', '.join(map(str, counts))} batches: every epoch ends with "
                f"the shortest, after {min(counts)}",
                UserWarning,
                stacklevel=2,
            )

    def remaining_steps(self, epochs: int) -> int | None:
        """Steps in the next ``epochs`` epochs; None if the loader has no length."""
        if self._batches is None:
            return None
        batches = [self._batches] * epochs
        batches[:1] = [self._batches - self.progress.batch]
        return sum(map(self._steps_of, batches))

    def begin_epoch(self) -> None:
        """Start the next epoch, or go on with an interrupted one."""
        start = data_position.begin(self._loader, self.progress.epoch, self._settings.device)
        if self.progress.batch == 0:
            self._epoch_start = start

    def groups(self) -> Iterator[list[Batch]]:
        """The remaining batches of this epoch, in one list a step; the last list may be shorter.

        All ranks get equally many. Where a loader has no length, or is a stream, whose length is a
        guess, they agree before every step, for which a GPU is waited for.
        """
        done, device = self.progress.batch, self._settings.device
        drawn = data_position.batches(self._loader, done, self._epoch_start, device)
        batches = map(self._settings.prepare_batch, drawn)
        world, several = self._settings.world, self._settings.world.size > 1
        is_stream = isinstance(getattr(self._loader, "dataset", None), IterableDataset)
        common = self._common_batches() if several and not is_stream else None
        if common is not None:
            batches = map(self._settings.prepare_batch, islice(drawn, max(common - done, 0)))
        while True:
            group = list(islice(batches, self._settings.accumulate))
            if several and common is None:
                counts = world.gather(len(group))
                self._warn_if_unequal([self.progress.batch + count for count in counts])
                group = group[: min(counts)]
            if not group:
                break
            if several and not self._knows_ranks:
                self._raise_if_equal(group[0])
                self._knows_ranks = True
            yield group
        if self.progress.batch == 0:
            raise ValueError("train_loader gave no batches; expected at least one")
        if common is not None and self.progress.batch < common:
            raise ValueError(
                f"train_loader has a length of {self.batches_an_epoch}, and gave "
                f"{self.progress.batch} batches: the other ranks go on"
            )

    def _raise_if_equal(self, batch: Batch) -> None:
        """Refuse a loader that gives several ranks the same batches."""
        parts = (part.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for part in batch)
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).digest()
        if len(set(self._settings.world.gather(digest))) < self._settings.world.size:
            raise ValueError(
                "train_loader gives several ranks the same batches: split its data by "
                "fastmp.distributed.rendezvous.current().rank; a DataLoader over a data set with "
                "indices is split by the trainer"
            )

    # ---- the state ----

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""
        settings, shards = self._settings, self._settings.shards
        model, optimizer = settings.model, settings.optimizer
        saved = shards.full_optimizer_state(optimizer) if shards else optimizer.state_dict()
        own = {
            "rng": rng.state(settings.device),
            "mixup": None if settings.mixup is None else settings.mixup.state_dict(),
            "epoch_start": self._epoch_start,
            "loader": data_position.own_state(self._loader),
        }
        return {
            "model": shards.full_model_state() if shards else model.state_dict(),
            "optimizer": saved if self._ema is None else _without_averages(saved),
            "scaler": settings.scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
            "progress": asdict(self.progress),
            "schedule": asdict(self.place),
            "batches_an_epoch": self._batches,
            "param_index": self._param_index(),
            "ranks": settings.world.gather(own),
        }

    def _param_index(self) -> dict[str, int]:
        """The number in the optimizer of each parameter of the model, tied ones under each name."""
        settings = self._settings
        groups = settings.optimizer.param_groups
        numbers = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        named = (
            settings.shards.named_parameters()
            if settings.shards
            else settings.model.named_parameters(remove_duplicate=False)
        )
        return {name: numbers[p] for name, p in named if p in numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        settings = self._settings
        self._refuse_other(state)
        if settings.shards is None:
            settings.model.load_state_dict(state["model"])
            settings.optimizer.load_state_dict(state["optimizer"])
        else:
            settings.shards.load_full_model_state(state["model"])
            settings.shards.load_full_optimizer_state(settings.optimizer, state["optimizer"])
        settings.scaler.load_state_dict(state["scaler"])
        if self._ema is not None and state["ema"] is not None:
            self._ema.load_state_dict(state["ema"])
        elif self._ema is not None:
            self._ema.restart()
        self.progress = Progress(**state["progress"])
        self.place.load(state.get("schedule", {"steps_per_epoch": self.progress.steps_per_epoch()}))
        self._batches, self._resumed = state.get("batches_an_epoch"), True
        ranks, world = state["ranks"], settings.world
        if len(ranks) != world.size:
            if self._batches is None:
                self.progress.batch = self.progress.batch * len(ranks) // world.size
            return
        own = ranks[world.rank]
        self._epoch_start = own["epoch_start"]
        self._loader_state = own["loader"]
        if settings.mixup is not None and own["mixup"] is not None:
            settings.mixup.load_state_dict(own["mixup"])
        rng.restore(own["rng"], settings.device)

    def _refuse_other(self, state: dict[str, Any]) -> None:
        """Raise ``CheckpointError`` for the state of another model or kind of optimizer."""
        missing = {"model", "optimizer", "scaler", "ema", "progress", "ranks"} - state.keys()
        if missing:
            raise CheckpointError(
                f"expected the state of a trainer, got one without {', '.join(sorted(missing))}"
            )
        settings = self._settings
        own, saved = settings.model.state_dict(), state["model"]
        for name in own | saved:
            here, there = (_shape(s[name]) if name in s else "none" for s in (own, saved))
            if here != there:
                raise CheckpointError(
                    f"the checkpoint is of another model: {name} has the shape {there} in it and "
                    f"{here} in this model; build the model and the data as the run had them"
                )
        both = (settings.optimizer.param_groups, state["optimizer"]["param_groups"])
        own_groups, saved_groups = ([_described(group) for group in groups] for groups in both)
        if own_groups != saved_groups:
            raise CheckpointError(
                f"the checkpoint is of another optimizer: its groups are {saved_groups}, those of "
                f"this one {own_groups}; build the optimizer as the run had it"
            )

    # ---- on disk ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint."""
        state = self.state_dict()
        if self._settings.world.is_first:
            checkpoint.save(path, state)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a checkpoint."""
        world = self._settings.world
        self.load_state_dict(
            world.broadcast_object(checkpoint.load(path) if world.is_first else None)
        )

    def load_newest(self) -> bool:
        """Load the newest complete checkpoint of the folder; False if there is none."""
        newest = None if self.checkpoints is None else self.checkpoints.load_newest()
        state = self._settings.world.broadcast_object(newest)
        if state is None:
            self.log.rewind(0, 0)  # of a run that was killed before its first checkpoint
            return False
        self.load_state_dict(state)
        self.log.resume(self.progress.step, self.progress.epoch)
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which the folder is this run's alone; raises ``files.FolderInUse``.

        The weights of a run that ends there are in ``model.safetensors``, fp32; a run that does not
        leaves no such file, since checkpoints are newer.
        """
        folder = None if self.checkpoints is None else self._settings.folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if folder is None else files.locked(folder):
            if folder is not None:
                (folder / weights.FILE).unlink(missing_ok=True)
            yield
            if self._settings.folder is None:
                return
            state = self.state_dict()  # every rank has a part of it
            if folder is not None:
                about = {"step": str(self.progress.step), "epoch": str(self.progress.epoch)}
                weights.write(folder / weights.FILE, weights.fp32_weights(state), about)

    def save_in_folder(self, score: float | None = None) -> None:
        """Write a checkpoint into the folder, if there is one, in the background."""
        if self._settings.folder is None:
            return
        state = self.state_dict()
        if self.checkpoints is not None:
            path = self.checkpoints.save(state, self.progress.step, score)
            self.log.write("saved", step=self.progress.step, path=path.name)

    @contextmanager
    def saved_first(self) -> Iterator[None]:
        """Save before the block, the validation; an error in it says that the epoch is saved.

        Not afterwards: when a kernel has failed on a GPU, its memory cannot be read any more. A run
        that is resumed from there repeats the validation and goes on as if there had been no error.
        """
        self.save_in_folder()
        try:
            yield
        except Exception as error:
            folder = self._settings.folder
            if folder is not None:
                try:
                    self.wait()
                    note = f"the state before the validation is saved in {folder / 'checkpoints'}"
                except (OSError, CheckpointError) as failed:
                    note = f"the state before the validation is not saved: {failed}"
                error.add_note(note)
            raise

    @contextmanager
    def saved_if_unreadable(self, save: Callable[[], str]) -> Iterator[None]:
        """Save when a batch in the block cannot be read: the state is that of the step before.

        Several ranks have no common one then: the others are within a step.

        Args:
            save: saves, and returns a sentence that says where.
        """
        try:
            yield
        except DataError as error:
            if self._settings.world.size == 1:
                error.add_note(save())
            raise

    def wait(self) -> None:
        """Return when the checkpoints of the folder are on disk."""
        if self.checkpoints is not None:
            self.checkpoints.wait()


def _without_averages(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state without the averages: "ema" has them by the model's names."""
    states = {
        index: {key: value for key, value in own.items() if key != "average"}
        for index, own in state["state"].items()
    }
    return {**state, "state": states}


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _described(group: dict[str, Any]) -> str:
    """The number of parameters of a group, and the hyperparameters that tell its optimizer."""
    named = [name for name in ("betas", "eps", "momentum", "nesterov") if name in group]
    return f"{len(group['params'])} parameters with {' and '.join(named)}"
