"""Mixed-precision training for PyTorch on hand-written kernels.

    optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
    mixup = fastmp.data.Mixup(alpha=0.2)

``fastmp.Trainer``, ``fastmp.data``, ``fastmp.checkpoint`` and ``fastmp.transfer`` need the extra
``fastmp[train]`` and are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmp import amp, backends, functional, nn, optim, schedule
from fastmp.amp import convert

if TYPE_CHECKING:
    from fastmp import checkpoint, data, transfer
    from fastmp.training.trainer import Trainer
    from fastmp.verification import verify

__version__ = "0.1.0"

__all__ = [
    "Trainer",
    "amp",
    "backends",
    "checkpoint",
    "convert",
    "data",
    "functional",
    "nn",
    "optim",
    "schedule",
    "transfer",
    "verify",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "data", "transfer"):
        return importlib.import_module(f"fastmp.{name}")
    if name == "Trainer":
        return importlib.import_module("fastmp.training.trainer").Trainer
    if name == "verify":
        return importlib.import_module("fastmp.verification").verify
    raise AttributeError(f"module 'fastmp' has no attribute {name!r}")
