"""The command line: the commands, their exit codes and error messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fastmp.checkpoint import CheckpointError
from fastmp.cli import bench, doctor, evaluate, export, lr_find, predict, train, verify
from fastmp.cli.bench import BenchmarkFailed
from fastmp.cli.verify import VerificationFailed
from fastmp.data import DataError
from fastmp.distributed.rendezvous import LauncherError
from fastmp.files import FolderInUse
from fastmp.models import ModelError
from fastmp.models.export import ExportError
from fastmp.models.run import RunError
from fastmp.recipe import ConfigError
from fastmp.training.log import LogError
from fastmp.training.lr_find import RangeTestError
from fastmp.training.signals import Terminated
from fastmp.training.trainer import RunStopped
from fastmp.transfer import TransferError

# One line, no traceback. An OSError names its file: one that cannot be read, a full disk.
USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    FolderInUse,
    LauncherError,
    LogError,
    ModelError,
    OSError,
    RangeTestError,
    RunError,
    TransferError,
)
TERMINATED = 128 + 15  # exit code of a process that SIGTERM ended, as shells report it; SIGHUP too

#: Every command, by name.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train.main,
    "predict": predict.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "lr-find": lr_find.main,
    "bench": bench.main,
    "verify": verify.main,
    "doctor": doctor.main,
}


def main(arguments: Sequence[str]) -> int:
    """Run ``fastmp`` with these arguments.

    Returns:
        0: done; 1: the run was stopped with its state saved, or a check failed; 2: bad usage or
        bad input, or a file that cannot be read or written; 143: stopped by SIGTERM or SIGHUP with
        the state saved.

    Raises:
        BrokenPipeError: the reader of the output has gone.
    """
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command not in COMMANDS:
        print(f"fastmp: error: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        notes = getattr(error, "__notes__", [])
        return _fail(command, f"error: {'; '.join([str(error), *notes])}", 2)
    except (BenchmarkFailed, RunStopped, VerificationFailed) as error:
        return _fail(command, str(error), 1)
    except Terminated as error:
        return _fail(command, f"{error}; --resume goes on from there", TERMINATED)
    except KeyboardInterrupt as error:
        return _fail(command, str(error) or "interrupted", 1)
    return 0


def _fail(command: str, message: str, code: int) -> int:
    """Print the message on the first of several ranks: an error on one stops all of them."""
    if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:
        print(f"fastmp {command}: {message}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:<9} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastmp COMMAND [FLAGS]",
            "",
            "commands:",
            *lines,
            "",
            "fastmp COMMAND --help: flags",
            "torchrun --nproc-per-node=N -m fastmp train [FLAGS]: on N devices",
        ]
    )
