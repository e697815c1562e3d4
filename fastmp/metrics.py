"""What training measured: on its way from the device, and as JSON lines on disk."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmp.fused import Fused

FILE = "metrics.jsonl"  # its name in a run folder


@dataclass(frozen=True)
class Step:
    """What one optimizer step decided, on the host.

    ``scale`` is the one the step was taken with, ``grad_norm`` that of the unscaled gradients
    before clipping, ``applied`` the number of applied steps so far.
    """

    step: int
    lr: float
    loss: float
    scale: float
    grad_norm: float
    skipped: bool
    applied: int


class Record:
    """A step's decisions on their way to the host; ``read`` waits for them and nothing after them.

    Args:
        step: number of the attempted step, from 1.
        lr: learning rate of the first parameter group in that step.
        loss, scale: 0-d tensors on the device.
        optimizer: has taken the step.
    """

    def __init__(self, step: int, lr: float, loss: Tensor, scale: Tensor, optimizer: Fused) -> None:
        self.step = step
        self.lr = lr
        decided = (loss, scale, optimizer.grad_norm, optimizer.found_inf, optimizer.applied_steps)
        self._values = torch.stack([value.detach().double() for value in decided])
        self._arrived: torch.cuda.Event | None = None
        if self._values.is_cuda:
            host = torch.empty(len(decided), dtype=torch.float64, pin_memory=True)
            self._values = host.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Step:
        """The decisions as numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, scale, grad_norm, found_inf, applied = self._values.tolist()
        return Step(self.step, self.lr, loss, scale, grad_norm, found_inf != 0, int(applied))


class Log:
    """JSON lines at ``path``, each on disk when ``write`` returns; a None path keeps nothing.

    Every line has a ``kind``. JSON has no infinities: ``null`` stands for a number that is not
    finite.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, kind: str, **row: Any) -> None:
        """Append one line."""
        if self._path is None:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as out:  # 20 µs, and no handle to lose
            out.write(json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")


def read(path: str | os.PathLike[str], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, in order."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]
