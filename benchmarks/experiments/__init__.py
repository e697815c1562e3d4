"""Experiments of minutes to hours, each a command: accuracy, convergence, transfer, overhead."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmp import data
from fastmp.bench.results import folder
from fastmp.data import Dataset
from fastmp.report.environment import environment

RESULTS = Path(__file__).parents[1] / "results"

#: Calls a function with each of these tuples of arguments; its results, in their order.
RunAll = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]


def save(title: str, content: dict[str, Any], lines: Iterable[str], device: str = "cpu") -> None:
    """Write <title>.json and <title>.md to the device's folder, and print the second."""
    facts, where = environment(device), folder(RESULTS, device)
    (where / f"{title}.json").write_text(json.dumps({**facts, **content}, indent=1) + "\n")
    head = [f"# {title}\n", *(f"- {key}: {value}" for key, value in facts.items())]
    text = "\n".join([*head, *lines]) + "\n"
    (where / f"{title}.md").write_text(text)
    print(text)


@contextmanager
def pool(processes: int) -> Iterator[RunAll]:
    """A function that runs jobs, so many at a time, each process with its share of the cores."""
    if processes == 1:
        yield lambda function, jobs: [function(*job) for job in jobs]
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with context.Pool(processes, torch.set_num_threads, (threads,)) as workers:
        yield lambda function, jobs: workers.starmap(function, jobs, chunksize=1)


@functools.cache
def fashion_mnist() -> Dataset:
    """From ``$FASTMP_DATA``, read once a process."""
    return data.load("fashion-mnist")
