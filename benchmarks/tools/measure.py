"""The stage of ``make gpu-check`` that measures: every case of fastmp.bench on this device.

What is asked of kernels comes first, training last; results are written after every case, so that
a run that is cut leaves what it has. goals.md says of each goal whether it was reached.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fastmp.bench import results
from fastmp.bench.harness import Case, Row, Verdict, copy_bandwidth
from fastmp.bench.linear import plain_mean
from fastmp.bench.subjects import SUBJECTS, run

GOALS = "goals.md"


def measure(cases: list[Case], where: Path, device: str, seconds: float) -> list[str]:
    """Time the cases until the seconds are over; the goals that were missed and the failures."""
    copy = copy_bandwidth(device)
    end = time.perf_counter() + seconds
    rows: list[Row] = []
    failed: list[str] = []
    for number, (name, found) in enumerate(run(cases), 1):
        rows += found or []
        failed += [] if found else [name]
        cut = [case.name for case in cases[number:]]
        goals = verdicts(rows, copy)
        write_goals(where / GOALS, goals, failed, cut)
        if rows:
            results.write("gpu", rows, copy, where, device)
        if time.perf_counter() > end:
            break
    if rows:
        results.draw("gpu", rows, copy, where, device)
    missed = [verdict.goal for verdict in goals if not verdict.reached]
    count = f"{len(goals) - len(missed)} of {len(goals)} goals reached, {len(failed)} cases failed"
    print(count + (f", cut: {', '.join(cut)}" if cut else ""))
    return missed + failed


def verdicts(rows: list[Row], copy: float) -> list[Verdict]:
    """On all that is asked of the rows."""
    found = [
        verdict._replace(goal=f"{row.case}: {verdict.goal}")
        for row in rows
        for verdict in row.verdicts(copy)
    ]
    mean = plain_mean(rows)
    return found if mean is None else [*found, mean]


def write_goals(path: Path, goals: list[Verdict], failed: list[str], cut: list[str]) -> None:
    """A line for each goal, each case that failed and each that was not come to."""
    lines = [f"| {g} | {value} | {'pass' if ok else '**fail**'} |" for g, value, ok in goals]
    lines += [f"| {name} | - | **error** |" for name in failed]
    lines += [f"| {name} | not measured | cut |" for name in cut]
    path.write_text("\n".join(["| goal | measured | |", "| --- | --- | --- |", *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tools.measure", description=__doc__)
    parser.add_argument("results", type=Path, help="folder for goals.md, gpu.md, gpu.json, *.png")
    parser.add_argument("--seconds", type=float, default=600, help="no case begins after these")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for make in SUBJECTS.values() for case in make(device, device == "cpu")]
    sys.exit(bool(measure(cases, options.results, device, options.seconds)))


if __name__ == "__main__":
    main()
