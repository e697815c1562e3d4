"""``fastmp bench``: speed on this machine, against the best there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fastmp import recipe
from fastmp.bench import results
from fastmp.bench.harness import Row, copy_bandwidth
from fastmp.bench.subjects import SUBJECTS, run
from fastmp.recipe import TrainConfig
from fastmp.recipe.config import COUNT, OPTIONAL_INT, shown_default

Subject = Literal["optimizer", "muon", "loss", "linear", "train", "scaling"]


class BenchmarkFailed(Exception):
    """A case did not run, or computed something else than its baselines."""


@dataclass(frozen=True)
class Bench:
    """Time kernels, loss, step and training against PyTorch, AMP, torch.compile and others.

    Others are timed where they are installed: pip install 'fastmp[third-party]'.
    """

    subjects: tyro.conf.Positional[tuple[Subject, ...]] = (
        "optimizer", "muon", "loss", "linear", "train", "scaling",
    )  # fmt: skip
    """Subjects to time."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: cuda if there is one."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("bench")
    """Tables, JSON and pictures go into a folder in it that is named after the device."""

    quick: bool = False
    """Small and unsaved, in a minute: does it run?"""

    threads: Annotated[int | None, OPTIONAL_INT, shown_default("INT", "torch's")] = None
    """CPU threads."""


def main(arguments: Sequence[str]) -> None:
    """Time kernels, loss, step and training against PyTorch, AMP, torch.compile and others."""
    measure(tyro.cli(Bench, prog="fastmp bench", args=arguments))


def measure(given: Bench) -> None:
    """Time the subjects in turn, print each one's table and write its files.

    Raises:
        ConfigError: no such number of threads, or nothing can be written to ``out``; nothing was
            timed.
        BenchmarkFailed: a case failed; the others are done and written.
    """
    if given.threads is not None:
        COUNT.check("threads", given.threads)
    if not given.quick:
        recipe.make_folder("out", given.out)
    device = recipe.device_of(TrainConfig(device=given.device)).type
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    copy = copy_bandwidth(device)
    failed: list[str] = []
    for subject in given.subjects:
        rows: list[Row] = []
        for name, found in run(SUBJECTS[subject](device, given.quick)):
            rows += found or []
            failed += [] if found else [name]
        if not rows:
            continue
        print(f"\n{subject}\n\n{results.table(rows, copy)}\n", flush=True)
        if not given.quick:
            where = results.folder(given.out, device)
            results.write(subject, rows, copy, where, device)
            results.draw(subject, rows, copy, where, device)
            print(f"written to {where}/{subject}.md, .json and .png")
    if failed:
        raise BenchmarkFailed(f"failed: {'; '.join(failed)}")
