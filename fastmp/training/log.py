"""The log of a run: JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastmp.files import atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"  # in the folder of a run
EVENTS = "events"
EVENTS_EVERY = 10  # steps: the events of one take 0.5 ms, the line of JSON 0.03

# TensorBoard tags of a row's values; other kinds of rows have no curves
_TAGS = {
    "step": {name: f"train/{name}" for name in ("loss", "lr", "grad_norm", "scale", "skipped")},
    "epoch": {
        "val_loss": "val/loss",
        "val_accuracy": "val/accuracy",
        "samples_per_second": "speed/samples_per_second",
    },
}


class LogError(ValueError):
    """A line that is no row of a log; the message says what to do."""


class Log:
    """JSON lines in ``folder``, each on disk when ``write`` returns, and TensorBoard's events.

    Every line has a ``kind``. JSON has no infinities: ``null`` stands for a number that is not
    finite. A None folder keeps nothing; without the package ``tensorboard`` there are no events.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lines: TextIO | None = None  # open from the first line on: opening takes 0.1 ms
        self._events: SummaryWriter | None = None
        self._resumed: tuple[int, int] | None = None  # step and epochs to go on from, until a row
        self._purged = 0  # TensorBoard drops the events of an interrupted run from here on

    def write(self, kind: str, **row: Any) -> None:
        """Append one line."""
        if self._folder is None:
            return
        if self._resumed is not None:
            (step, epochs), self._resumed = self._resumed, None
            self.rewind(step, epochs)
            self.write("resumed", step=step)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        if self._lines is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = (self._folder / FILE).open("a", buffering=1, encoding="utf-8")
        self._lines.write(json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")
        tags = _TAGS.get(kind, {})
        if kind == "telemetry":
            tags = {name: f"telemetry/{name}" for name in row if name != "step"}
        frequent = kind in ("step", "telemetry") and not row.get("skipped")
        if frequent and row["step"] % EVENTS_EVERY != 0:
            return
        if tags and (events := self._open_events()) is not None:
            for name, tag in tags.items():
                if row[name] is not None:
                    events.add_scalar(tag, float(row[name]), row["step"])

    def resume(self, step: int, epochs: int) -> None:
        """Go on after ``step`` and so many epochs: the next row drops all after them, and notes it.

        Raises:
            LogError: a line that is no row; nothing is written then.
        """
        if self._folder is not None and (self._folder / FILE).exists():
            read(self._folder / FILE)
        self._resumed = step, epochs

    def rewind(self, step: int, epochs: int) -> None:
        """Drop all rows after ``step``, and of an epoch that was validated, but not saved then."""
        if self._folder is None or not (self._folder / FILE).exists():
            return
        self.close()
        path = self._folder / FILE
        kept = [
            row
            for row in read(path)
            if row.get("step", 0) <= step
            and not (row["kind"] == "epoch" and row.get("epoch", 0) > epochs)
        ]
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._purged = step + 1

    def close(self) -> None:
        """Flush the events that are still in memory, and close the files."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _open_events(self) -> SummaryWriter | None:
        if self._events is None and self._folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter  # takes a second
            except ImportError:
                return None
            purge = self._purged or None
            self._events = SummaryWriter(str(self._folder / EVENTS), purge_step=purge)
        return self._events


def read(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The rows, of one kind or all, in order.

    Raises:
        LogError: a line that is no row; a torn last line of a killed run is left out.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # a torn line has no line feed
        try:
            row = json.loads(line)
            wanted = kind in (None, row["kind"])
        except (ValueError, TypeError, KeyError) as error:
            shown = line[:60].decode(errors="backslashreplace")
            raise LogError(
                f"{path}, line {number}: expected JSON with a kind, got {shown!r}; "
                "delete the line, or the file"
            ) from error
        if wanted:
            rows.append(row)
    return rows
