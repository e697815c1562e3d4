"""Results on disk: a table in Markdown, everything in JSON, and pictures."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from fastmp.bench import pictures
from fastmp.bench.harness import OURS, Row
from fastmp.report.environment import device_name, environment

COLUMNS = (
    "case", "fastmp, ms (p20 to p80)", "best baseline, ms", "ratio", "host, ms", "others", "goals",
    "rate (of bound)",
)  # fmt: skip


def folder(parent: Path, device: str = "cpu") -> Path:
    """The device's folder under ``parent``; it is made."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = parent / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def table(rows: list[Row], copy: float) -> str:
    """The rows in Markdown; copy: GB/s of a plain copy, the bound of bytes moved."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(row, copy) for row in rows)]
    if not any(row.host_ratios for row in rows):  # on a CPU there is one time only
        lines = [[cell for i, cell in enumerate(line) if i != 4] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row, copy: float) -> list[str]:
    ours, best = row.timings[OURS], row.timings[row.baseline]
    others = ", ".join(
        f"{name} {ratio:.2f}x" + (" (not ranked)" if name in row.not_comparable else "")
        for name, ratio in row.ratios.items()
        if name != row.baseline
    )
    host = "-"
    if ours.host and best.host:
        ratio = row.host_ratios[row.baseline]
        host = f"{_digits(ours.host)}, {_digits(best.host)} ({ratio:.2f}x)"
    return [
        row.case,
        f"{_digits(ours.median)} ({_digits(ours.p20)} to {_digits(ours.p80)})",
        f"{_digits(best.median)} ({row.baseline})",
        f"**{row.ratio:.2f}x**",
        host,
        others or "-",
        goals(row, copy) or "-",
        row.rate(copy),
    ]


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def goals(row: Row, copy: float) -> str:
    """The goals of a row, each with the measured value and "reached" or "missed"."""
    return ", ".join(
        f"{goal}: {measured} {'reached' if reached else '**missed**'}"
        for goal, measured, reached in row.goal_results(copy)
    )


def write(title: str, rows: list[Row], copy: float, where: Path, device: str) -> None:
    """Write <title>.json and <title>.md."""
    facts = environment(device)
    content = {**facts, "copy_gigabytes_per_second": copy, "rows": [asdict(row) for row in rows]}
    (where / f"{title}.json").write_text(json.dumps(content, indent=1) + "\n")
    head = [f"{key}: {value}" for key, value in facts.items()]
    peaks = sorted({row.peak for row in rows if row.peak})
    if peaks:
        head.append(f"multiply-adds at most, GFLOP/s: {', '.join(f'{p:.0f}' for p in peaks)}")
    head.append(
        f"a plain copy: {copy:.1f} GB/s "
        "(read + write, not counting that it also reads the lines it writes)"
    )
    if device == "cuda":
        head.append(
            "times are of the device, of a training step until the device is idle; "
            "host: until the call returns, fastmp and the best baseline"
        )
    head_lines = "\n".join(f"- {line}" for line in head)
    notes = "\n".join(f"- {row.case}: {row.notes}" for row in rows if row.notes)
    text = f"# {title}\n\n{head_lines}\n\n{table(rows, copy)}\n\n{notes}"
    (where / f"{title}.md").write_text(text.rstrip() + "\n")


def draw(title: str, rows: list[Row], copy: float, where: Path, device: str) -> None:
    """The pictures: <title>.png, and -bandwidth and -accuracy where rows have such data."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: they need matplotlib, pip install 'fastmp[train]'", file=sys.stderr)
        return
    heading = f"{title}: {device_name(device)}, {date.today().isoformat()}"
    pictures.ratios(where / f"{title}.png", heading, rows)
    pictures.bandwidth(where / f"{title}-bandwidth.png", heading, rows, copy)
    pictures.accuracy(where / f"{title}-accuracy.png", heading, rows)
