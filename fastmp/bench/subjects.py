"""What is measured, by name, and the loop over cases."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from fastmp.bench import linear, loss, optimizer, scaling, train
from fastmp.bench.harness import Case, Row
from fastmp.data import DataError

#: Functions of (device, quick) by subject; quick: small, to see that it runs.
SUBJECTS: dict[str, Callable[[str, bool], list[Case]]] = {
    "optimizer": optimizer.cases,
    "loss": loss.cases,
    "linear": linear.cases,
    "train": train.cases,
    "scaling": scaling.cases,
}


def run(cases: Sequence[Case]) -> Iterator[tuple[str, list[Row] | None]]:
    """(name, rows) of each case when it is done; None, with a traceback on stderr: it failed."""
    for case in cases:
        start = time.perf_counter()
        rows: list[Row] | None = None
        try:
            rows = case.rows()
        except DataError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
        except Exception:
            traceback.print_exc()
        verdict = "failed, " if rows is None else ""
        print(f"{case.name}: {verdict}{time.perf_counter() - start:.1f} s", file=sys.stderr)
        yield case.name, rows
