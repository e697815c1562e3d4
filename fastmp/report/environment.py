"""Device, date and versions, for the head of a report or of a benchmark's results."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastmp import backends
from fastmp.backends import cpu
from fastmp.backends.cpu import gemm_choice
from fastmp.distributed import rendezvous

_package: Any = sys.modules["fastmp"]  # a higher layer


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, date and versions, for the head of a report or of a benchmark's results."""
    device = torch.device(device)
    served = [f"{s.op}: {s.backend}" for s in backends.report() if s.device == device.type]
    return {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "fastmp": _package.__version__,
        "commit": _commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "backend": cpu.load()[1],
        "operations": "; ".join(served),
    }


def working_device(name: str) -> torch.device:
    """The device of this name, "auto" for a GPU if there is one; of several that of this process.

    Raises:
        ValueError: this machine has no such device.
    """
    kind = name
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = rendezvous.own_device(kind)
        torch.zeros(1, dtype=torch.float32, device=device).item()  # which "meta" has not
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected one that works here, got {name!r}: {reason}") from error
    return device


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{gemm_choice.processor().name}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of a checkout; "unknown" for an installed package or without git."""
    root = Path(_package.__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
