"""The subjects by name, and the loop over cases."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from fastmp.bench import linear, loss, muon, optimizer, scaling, train
from fastmp.bench.harness import Case, Row
from fastmp.data import DataError

#: Functions of (device, quick) by subject; quick: small, a test that it runs.
SUBJECTS: dict[str, Callable[[str, bool], list[Case]]] = {
    "optimizer": optimizer.cases,
    "muon": muon.cases,
    "loss": loss.cases,
    "linear": linear.cases,
    "train": train.cases,
    "scaling": scaling.cases,
}


def run(cases: Sequence[Case]) -> Iterator[tuple[str, list[Row] | None]]:
    """(name, rows) of each case as it ends; None: it failed, with a traceback on stderr."""
    for case in cases:
        yield case.name, run_case(case)


def run_case(case: Case) -> list[Row] | None:
    """Its rows, or None."""
    begin = time.perf_counter()
    rows: list[Row] | None = None
    try:
        rows = case.rows()
    except DataError as error:  # the user's: one line, no traceback
        print(f"{case.name}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    failed = "failed, " if rows is None else ""
    print(f"{case.name}: {failed}{time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return rows
