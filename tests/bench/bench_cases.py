"""Rows of a benchmark."""

from fastmp.bench.harness import Row, Timing


def row(case="a case", ours=1.0, series="", **others):
    timings = {k: Timing(v, v, v) for k, v in {"fastmp": ours, **others}.items()}
    return Row("loss", case, timings, 10**6, series=series)
