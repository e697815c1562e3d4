"""The checkpoints of a run: one folder each, written in the background; the newest and best stay.

``step-000001234`` appears by one rename, when all of its files are on the disk: a folder of that
name is whole, wherever a kill hits. Saving copies the state in memory; a thread computes the sums,
writes the files and calls fsync.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmp.checkpoint.format import CheckpointError, load, read_entry, save
from fastmp.files import sync

_NAME = re.compile(r"step-(\d{9,})")
_UNFINISHED = ".unfinished"
_ABOUT = "checkpoint"  # the entry with step and score


class Checkpoints:
    """The checkpoints in ``folder``.

    Args:
        folder: created by the first save.
        keep: number of the newest to keep, besides the one with the highest score.
        background: write on a thread; ``wait`` and the next ``save`` raise its errors.

    Raises:
        ValueError: ``keep`` below 1.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keep: int = 2, background: bool = True
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        # the interpreter joins this thread before it exits: the last save is completed
        self._writer = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: Future[None] | None = None

    def save(self, state: Mapping[str, Any], step: int, score: float | None = None) -> Path:
        """Save a copy of ``state`` as the checkpoint of ``step``; the state may change afterwards.

        A checkpoint of the same step is replaced.

        Args:
            state: as ``checkpoint.save`` takes it.
            step: number of the last step before it.
            score: of this checkpoint; the highest is the best.

        Returns:
            its path, which exists when the save is complete.

        Raises:
            CheckpointError, OSError: the save before this one failed.
        """
        self.wait()
        content = _copied({**state, _ABOUT: {"step": step, "score": score}})
        path = self.folder / f"step-{step:09d}"
        if self._writer is None:
            self._write(path, content)
        else:
            self._pending = self._writer.submit(self._write, path, content)
        return path

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            CheckpointError, OSError: the last save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Path | None:
        """The checkpoint of the latest step."""
        paths = self._all()
        return paths[-1] if paths else None

    def best(self) -> Path | None:
        """The checkpoint with the highest score; of several, the latest; unscored ones last."""
        scores = {path: _score(path) for path in self._all()}
        return max(scores, key=lambda path: (scores[path], path), default=None)

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the latest whole checkpoint; None if there is none at all.

        A damaged one is passed over with a warning.

        Raises:
            CheckpointError: there are checkpoints, all of them damaged.
        """
        problems = []
        for path in reversed(self._all()):
            try:
                state = load(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"passed over: {problem}", stacklevel=2)
            return state
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(problems)}"
            )
        return None

    def _all(self) -> list[Path]:
        """The finished ones, by step.

        A link to a disk that is not there is no empty folder: a run would start from scratch.
        """
        if not self.folder.is_dir():
            if os.path.lexists(self.folder):
                raise CheckpointError(
                    f"{self.folder}: expected a folder of checkpoints, found a file or a broken "
                    "link; bring the folder back, or remove what is there to start again"
                )
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()  # leftovers of a killed run
        if path.is_dir():  # of the same step: one rename of its manifest replaces it
            save(path, content)
        else:
            path.unlink(missing_ok=True)
            unfinished = path.with_name(path.name + _UNFINISHED)
            save(unfinished, content)
            unfinished.rename(path)
            sync(self.folder)
        best = self.best()
        for old in self._all()[: -self.keep]:
            if old != best:
                # renamed first: a half-removed folder must not look whole
                old.rename(old.with_name(old.name + _UNFINISHED))
        self._clear()

    def _clear(self) -> None:
        for left in self.folder.glob(f"*{_UNFINISHED}"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:  # none of ours
                left.unlink()


def _copied(value: Any) -> Any:
    """A copy, with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def _score(path: Path) -> float:
    try:
        score = read_entry(path, _ABOUT)["score"]
    except (CheckpointError, KeyError, TypeError):
        return -math.inf
    return -math.inf if score is None else float(score)
