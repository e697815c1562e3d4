"""The results of ``fastmp train``: the table, the picture and the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastmp import backends, doctor
from fastmp.recipe import TrainConfig
from fastmp.training import log
from fastmp.training.trainer import Trainer


@contextmanager
def reported(config: TrainConfig, trainer: Trainer) -> Iterator[None]:
    """After the block, also after an error or a signal in it, write the files and print the table.

    The weights are saved by then: where a file cannot be written, a warning says why. After an
    ``OSError`` nothing is tried: the folder takes no files.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:  # as of a write to an open file
            error.filename = str(trainer.folder)
        raise
    except BaseException:
        _write_files(config, trainer)
        raise
    _write_files(config, trainer)
    if trainer.world.is_first:
        attempt("the table", lambda: print(_table(_facts(config, trainer))))


def _write_files(config: TrainConfig, trainer: Trainer) -> None:
    out = trainer.folder
    if out is None or not trainer.step or not trainer.world.is_first:
        return
    title = f"{config.model} on {config.data}, {config.dtype}"

    def draw() -> None:
        from fastmp.report import curves  # imports Matplotlib

        curves.draw(out, title)

    def write_page() -> None:
        from fastmp.report import html

        html.write(out, title, _facts(config, trainer), doctor.environment(trainer.device))

    attempt("curves.png", draw)
    attempt("report.html", write_page)


def attempt(name: str, make: Callable[[], object]) -> None:
    """Call ``make``; an error of any kind is a warning: a report must not lose its run."""
    try:
        make()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        print(
            f"fastmp: warning: {name} could not be made: {type(error).__name__}: {reason}",
            file=sys.stderr,
        )


def _facts(config: TrainConfig, trainer: Trainer) -> dict[str, str]:
    """The results of the run, from its log, which includes the steps before a resume."""
    assert trainer.folder is not None
    epochs = log.read(trainer.folder / log.FILE, "epoch")
    seconds = sum(row["seconds"] for row in epochs)
    samples = sum(row["seconds"] * row["samples_per_second"] for row in epochs)
    masters = "" if config.dtype == "fp32" else ", fp32 masters"
    facts = {}
    if epochs:
        facts["test accuracy"] = f"{epochs[-1]['val_accuracy']:.2%} after {len(epochs)} epochs"
        facts["training time"] = f"{seconds:.1f} s"
        facts["speed"] = f"{samples / seconds:,.0f} samples/s"
    facts["weights"] = f"{config.dtype}{masters}"
    facts["skipped steps"] = f"{int(trainer.optimizer.skipped_steps)} of {trainer.step}"
    facts["peak memory"] = f"{_peak_memory(trainer.device) / 2**20:,.0f} MiB"
    for served in backends.report():
        if served.device == trainer.device.type:
            facts[served.op] = f"{served.backend} ({served.reason})"
    return facts


def _table(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(["", *(f"  {name:<{width}}  {value}" for name, value in facts.items())])


def _peak_memory(device: torch.device) -> int:
    """Bytes: the peak of the device's allocator, or on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
