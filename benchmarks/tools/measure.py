"""The stage of ``make gpu-check`` that measures: every case of fastmp.bench on this device.

A case is a process. As many as there are cores, at most 16, compile their kernels side by side;
then each waits for its turn and is timed alone: those that are not compiled yet are stopped until
all turns are over, and go on beside the next cases. (Compiling in 16 processes doubled host times.)
The results are written after every case: a run that is cut short keeps its rows, those of the goals
that matter first. goals.md lists the goals and whether they were reached.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from fastmp.bench import results
from fastmp.bench.harness import ON_COMPILED, Case, GoalResult, Row, copy_bandwidth
from fastmp.bench.linear import plain_mean
from fastmp.bench.subjects import SUBJECTS, run_case

GOALS = "goals.md"
PROCESSES = min(os.cpu_count() or 1, 16)  # each has a context of 0.5 GB on the device
ROUND_SECONDS = 25.0  # if not all of a round's new cases are compiled before
COMPILE_SECONDS = 180.0  # a case that compiles longer has failed
TURN_SECONDS = 120.0  # likewise one whose turn takes longer
#: Parts of names: the first that fits a case says when it begins; the others come last.
ORDER = (
    "train: ResNet", "train: ViT", "train: GPT", "muon:", "loss:", "optimizer:", "activated_case",
    "gelu_case", "mlp_case", " step float", "linear:",
)  # fmt: skip
Make = Callable[[], Case]  # picklable


# ---- cases as processes ----


class CaseProcess(NamedTuple):
    """A case that compiles in a process of its own."""

    name: str
    process: multiprocessing.process.BaseProcess
    connection: Connection

    def receive(self, end: float, message: str = "") -> tuple[str, list[Row] | None]:
        """Its answer: ("compiled", None), ("done", rows or None: it failed) or ("late", None)."""
        try:
            if message:
                self.connection.send(message)
            if not self.connection.poll(max(0.0, end - time.perf_counter())):
                return "late", None
            answer: tuple[str, list[Row] | None] = self.connection.recv()
            return answer
        except (EOFError, OSError):  # the process has ended
            return "done", None

    def signal(self, number: int) -> None:
        """To the process and those that compile for it."""
        assert self.process.pid
        with suppress(ProcessLookupError):  # it has ended, or does not lead a group yet
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End it, with its memory and its load."""
        self.process.kill()
        self.process.join()
        self.signal(signal.SIGKILL)


@contextmanager
def paused(cases: Sequence[CaseProcess]) -> Iterator[None]:
    """In the block they leave cores and device alone."""
    for case in cases:
        case.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for case in cases:
            case.signal(signal.SIGCONT)


def _lead_group() -> None:
    """A group of its own, to be paused as one, which still ends with the parent."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve(make: Make, connection: Connection) -> None:
    def wait_for_turn() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # for the others
        connection.send(("compiled", None))
        connection.recv()

    _lead_group()
    ON_COMPILED.append(wait_for_turn)
    connection.send(("done", run_case(make())))


def start(name: str, make: Make) -> CaseProcess:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(make, there))
    process.start()
    there.close()  # so that the end of the process ends the connection
    return CaseProcess(name, process, here)


def side_by_side(
    makes: dict[str, Make],
    seconds: float,
    processes: int = PROCESSES,
    round_seconds: float = ROUND_SECONDS,
    compile_seconds: float = COMPILE_SECONDS,
) -> Iterator[tuple[str, list[Row] | None]]:
    """(name, rows) of each case as it ends, None if it failed; until the seconds are over."""
    end = time.perf_counter() + seconds
    waiting = list(makes.items())
    running: list[CaseProcess] = []
    compiling: Counter[str] = Counter()  # seconds
    try:
        while (waiting or running) and time.perf_counter() < end:
            begin = time.perf_counter()
            free = processes - len(running)
            new = [start(*item) for item in waiting[:free]]
            waiting = waiting[free:]
            limit = min(end, begin + round_seconds)
            answers = [(case, *case.receive(limit)) for case in new]
            # those of earlier rounds are waited for when there are no others
            answers += [(case, *case.receive(begin if new else limit)) for case in running]
            running += new
            late = [case for case, state, _ in answers if state == "late"]
            for case in late:
                compiling[case.name] += math.ceil(time.perf_counter() - begin)
            with paused(late):
                for case, state, rows in answers:
                    if state == "late" and compiling[case.name] < compile_seconds:
                        continue
                    if state == "compiled":
                        turn = min(end, time.perf_counter() + TURN_SECONDS)
                        state, rows = case.receive(turn, "go")
                    if time.perf_counter() > end:
                        return
                    if state == "late":
                        print(f"{case.name}: it takes too long", file=sys.stderr)
                    case.stop()  # before the next one is timed
                    running.remove(case)
                    yield case.name, rows
    finally:
        for case in running:
            case.stop()


# ---- results and goals ----


def measure(
    names: Iterable[str],
    timed: Iterable[tuple[str, list[Row] | None]],
    copy: float,
    where: Path,
    device: str,
) -> list[str]:
    """Write the rows of the cases as they come; the goals that were missed and the failures.

    Args:
        names: of all cases.
        timed: (name, rows) of each case with a turn, in the order of the turns.
        copy: GB/s of a plain copy.
    """
    rows: list[Row] = []
    failed: list[str] = []
    cut = list(names)
    write_goals(where / GOALS, [], [], cut)
    for name, found in timed:
        cut.remove(name)
        rows += found or []
        failed += [] if found else [name]
        write_goals(where / GOALS, goal_results(rows, copy), failed, cut)
        if rows:
            results.write("gpu", rows, copy, where, device)
    if rows:
        results.draw("gpu", rows, copy, where, device)
    goals = goal_results(rows, copy)
    missed = [result.goal for result in goals if not result.reached]
    count = f"{len(goals) - len(missed)} of {len(goals)} goals reached, {len(failed)} cases failed"
    print(count + (f", cut: {', '.join(cut)}" if cut else ""))
    return missed + failed


def goal_results(rows: list[Row], copy: float) -> list[GoalResult]:
    """Of all rows, and the mean of the plain products."""
    found = [
        result._replace(goal=f"{row.case}: {result.goal}")
        for row in rows
        for result in row.goal_results(copy)
    ]
    mean = plain_mean(rows)
    return found if mean is None else [*found, mean]


def write_goals(path: Path, goals: list[GoalResult], failed: list[str], cut: list[str]) -> None:
    """A line for each goal, each case that failed and each that was not timed."""
    lines = [f"| {g} | {value} | {'pass' if ok else '**fail**'} |" for g, value, ok in goals]
    lines += [f"| {name} | - | **error** |" for name in failed]
    lines += [f"| {name} | not measured | cut |" for name in cut]
    path.write_text("\n".join(["| goal | measured | |", "| --- | --- | --- |", *lines, ""]))


def _case(subject: str, device: str, number: int) -> Case:
    return SUBJECTS[subject](device, device == "cpu")[number]


def place(name: str) -> int:
    """Of a case among all: whole networks compile for minutes beside the others, so they begin."""
    return next((i for i, part in enumerate(ORDER) if part in name), len(ORDER))


def in_order(makes: dict[str, Make], wanted: re.Pattern[str]) -> dict[str, Make]:
    """Those in whose name the pattern is found, as they are to begin."""
    names = sorted(filter(wanted.search, makes), key=place)
    return {name: makes[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tools.measure", description=__doc__)
    parser.add_argument("results", type=Path, help="folder for goals.md, gpu.md, gpu.json, *.png")
    parser.add_argument("--seconds", type=float, default=600, help="for all cases")
    parser.add_argument("--cases", type=re.compile, default="", help="regular expression of names")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    makes = {
        f"{subject}: {case.name}": partial(_case, subject, device, number)
        for subject, make in SUBJECTS.items()
        # without a GPU a case of each subject shows that the stage runs
        for number, case in enumerate(
            make(device, device == "cpu")[: 1 if device == "cpu" else None]
        )
    }
    makes = in_order(makes, options.cases)
    if not makes:
        parser.error(f"no case has {options.cases.pattern!r} in its name")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of 16 processes
    # of semaphores of tqdm's, when a process is killed
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    copy = copy_bandwidth(device)
    if device == "cuda":
        torch.cuda.empty_cache()
    timed = side_by_side(makes, options.seconds)
    sys.exit(bool(measure(makes, timed, copy, options.results, device)))


if __name__ == "__main__":
    main()
