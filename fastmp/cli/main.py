"""The command line: the commands, their exit codes and error messages."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import fastmp

# One line, no traceback. By module: an error is raised by a module that has been imported, and the
# commands that need no extra import none of the others. An OSError names its file.
_USER_ERRORS = {
    "fastmp.checkpoint": "CheckpointError",
    "fastmp.cli.verify": "VerifyError",
    "fastmp.data": "DataError",
    "fastmp.distributed.rendezvous": "LauncherError",
    "fastmp.files": "FolderInUse",
    "fastmp.models": "ModelError",
    "fastmp.models.export": "ExportError",
    "fastmp.models.run": "RunError",
    "fastmp.recipe": "ConfigError",
    "fastmp.training.log": "LogError",
    "fastmp.training.lr_find": "RangeTestError",
    "fastmp.transfer": "TransferError",
}
_STOPPED = {  # the state is saved, or a check failed
    "fastmp.cli.bench": "BenchmarkFailed",
    "fastmp.training.trainer": "RunStopped",
    "fastmp.cli.verify": "VerificationFailed",
}
TERMINATED = 128 + 15  # exit code of a process that SIGTERM ended, as shells report it; SIGHUP too

#: What every command does, by name; its module in ``fastmp.cli`` has the same one.
COMMANDS: dict[str, str] = {
    "train": "Train an image classifier with the whole recipe, on any devices.",
    "predict": "Print the class of each picture, by the model of a run.",
    "evaluate": "Accuracy, each class and the confusion matrix of a run's model.",
    "export": "A run's model as safetensors, ONNX or torch.export, checked.",
    "lr-find": "Find a peak learning rate: raise it step by step and watch the loss.",
    "bench": "Time kernels, step and training against PyTorch, AMP and others.",
    "verify": "Check every operation against fp64 and torch, on this machine.",
    "doctor": "Show versions, devices and backends, and how to fix what is wrong.",
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
    if command in ("-V", "--version"):
        print(f"fastmp {fastmp.__version__}")
        return 0
    if command not in COMMANDS:
        print(f"fastmp: error: unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"fastmp.cli.{command.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastmp"):
            raise
        needed = f"needs {error.name!r}; install it with: pip install 'fastmp[train]'"
        print(f"fastmp: error: fastmp {command} {needed}", file=sys.stderr)
        return 2
    try:
        module.main(rest)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        if type(error) is not KeyboardInterrupt:  # Terminated
            return _fail(command, f"{error}; --resume goes on from there", TERMINATED)
        return _fail(command, str(error) or "interrupted", 1)
    except Exception as error:
        if isinstance(error, (*_known(_USER_ERRORS), OSError)):
            notes = getattr(error, "__notes__", [])
            return _fail(command, f"error: {'; '.join([str(error), *notes])}", 2)
        if isinstance(error, _known(_STOPPED)):
            return _fail(command, str(error), 1)
        raise
    return 0


def _known(errors: dict[str, str]) -> tuple[type[Exception], ...]:
    """Those of the modules that have been imported."""
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in errors.items()
        if module in sys.modules
    )


def _fail(command: str, message: str, code: int) -> int:
    """Print the message on the first of several ranks: an error on one stops all of them."""
    if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:
        print(f"fastmp {command}: {message}", file=sys.stderr)
    return code


def _usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastmp COMMAND [FLAGS]",
            "",
            "commands:",
            *lines,
            "",
            "fastmp COMMAND --help: flags; fastmp --version: the version",
            "torchrun --nproc-per-node=N -m fastmp train [FLAGS]: on N devices",
        ]
    )
