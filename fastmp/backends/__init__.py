"""Which device code serves which operation, and why.

Each backend registers its kernels against the operations that ``fastmp.ops`` defines; what no
backend serves runs on the reference implementation in plain PyTorch. ``FASTMP_BACKEND=cpu`` turns
a missing library into an error, ``FASTMP_BACKEND=triton`` and ``FASTMP_BACKEND=cuda`` GPU kernels
that cannot run, for those who want to be sure.
"""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

BACKENDS = ("cpu", "triton", "cuda")
DEVICES = ("cpu", "cuda")


class Served(NamedTuple):
    """Who carries out an operation on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


_served: dict[tuple[str, str], Served] = {}


def record(op: str, device: str, backend: str, reason: str) -> None:
    """Note that ``backend`` serves ``op`` on ``device``."""
    _served[op, device] = Served(op, device, backend, reason)


def report() -> list[Served]:
    """What serves each operation on each kind of device, with the reason, one row each."""
    rows = dict(_served)
    for op, _ in _served:
        for device in DEVICES:
            reason = f"no kernel for {device}: plain PyTorch"
            rows.setdefault((op, device), Served(op, device, "reference", reason))
    return [rows[key] for key in sorted(rows)]


def required() -> str | None:
    """The backend demanded by ``FASTMP_BACKEND``, or None.

    Raises:
        ValueError: the variable names a backend that does not exist.
    """
    name = os.environ.get("FASTMP_BACKEND", "").strip().lower() or None
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"FASTMP_BACKEND must be one of {', '.join(BACKENDS)} (or unset), got {name!r}"
        )
    return name


def withdraw(backend: str, reason: str) -> None:
    """Note that a GPU's backend cannot run after all, and warn.

    Raises:
        RuntimeError: ``FASTMP_BACKEND`` demands it.
    """
    if required() == backend:
        raise RuntimeError(f"FASTMP_BACKEND={backend}, but {reason}")
    warnings.warn(
        f"fastmp runs on its slow reference backend ({reason}).", RuntimeWarning, stacklevel=3
    )
    for row in report():
        if row.device == "cuda" and row.backend == backend:
            record(row.op, "cuda", "reference", reason)
