"""Mixed-precision training for PyTorch on hand-written kernels.

    optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
    mixup = fastmp.data.Mixup(alpha=0.2)

``fastmp.Trainer``, ``fastmp.data``, ``fastmp.checkpoint`` and ``fastmp.transfer`` need the extra
``fastmp[train]`` and are imported when they are first used.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any


def _end_at_ctrl_c(number: int, frame: object) -> None:
    os.write(2, b"fastmp: interrupted\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# A command imports for seconds. A KeyboardInterrupt in torch's import may end in std::terminate, or
# be lost; __main__ takes the handler back. python -m sets argv[0] to -m until it knows the file.
_is_module = sys.argv[0] == "-m" and "-m fastmp" in " ".join(sys.orig_argv)
_is_command = _is_module or sys.argv[0].endswith("/fastmp")
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_ctrl_c)

from fastmp import amp, backends, functional, nn, optim, schedule  # noqa: E402 - after the hook
from fastmp.amp import convert  # noqa: E402

if TYPE_CHECKING:
    from fastmp import checkpoint, data, transfer
    from fastmp.models.run import load
    from fastmp.training.graphed import graphed
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
    "graphed",
    "load",
    "nn",
    "optim",
    "schedule",
    "transfer",
    "verify",
]


def __dir__() -> list[str]:
    return sorted(__all__)


#: Where the names are that are imported when they are first used.
_LAZY = {
    "Trainer": "fastmp.training.trainer",
    "checkpoint": "",
    "data": "",
    "graphed": "fastmp.training.graphed",
    "load": "fastmp.models.run",
    "transfer": "",
    "verify": "fastmp.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastmp' has no attribute {name!r}")
    try:
        if not _LAZY[name]:
            return importlib.import_module(f"fastmp.{name}")
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ImportError as error:  # of a package, or of one of these names by another
        if error.name is None or error.name.startswith("fastmp"):
            raise
        raise ImportError(
            f"fastmp.{name} needs {error.name!r}; install it with: pip install 'fastmp[train]'",
            name=error.name,
        ) from error
