"""Where results go: a table in Markdown, everything in JSON, and pictures."""

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
from fastmp.doctor import device_name, environment


def folder(parent: Path, device: str = "cpu") -> Path:
    """The device's folder under ``parent``; it is made."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = parent / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def table(rows: list[Row], copy: float) -> str:
    """The rows in Markdown; bytes moved are held against copy, the GB/s of a plain copy."""
    lines = [
        "| case | fastmp, ms (p20 to p80) | best baseline, ms | ratio | others | asked "
        "| rate (of bound) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, best = row.timings[OURS], row.timings[row.baseline]
        others = ", ".join(
            f"{name} {ratio:.2f}x" + (" (other work)" if name in row.aside else "")
            for name, ratio in row.ratios.items()
            if name != row.baseline
        )
        lines.append(
            f"| {row.case} | {_digits(ours.median)} ({_digits(ours.p20)} to {_digits(ours.p80)}) "
            f"| {_digits(best.median)} ({row.baseline}) | **{row.ratio:.2f}x** | {others or '-'} "
            f"| {asked(row, copy) or '-'} | {row.rate(copy)} |"
        )
    return "\n".join(lines)


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def asked(row: Row, copy: float) -> str:
    """What was asked of this row and whether it was reached, in words."""
    return ", ".join(
        f"{goal}: {measured} {'reached' if reached else '**missed**'}"
        for goal, measured, reached in row.verdicts(copy)
    )


def write(title: str, rows: list[Row], copy: float, where: Path, device: str) -> None:
    """Write <title>.json and <title>.md."""
    facts = environment(device)
    content = {**facts, "copy_gigabytes_per_second": copy, "rows": [asdict(row) for row in rows]}
    (where / f"{title}.json").write_text(json.dumps(content, indent=1) + "\n")
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    peaks = sorted({row.peak for row in rows if row.peak})
    if peaks:
        head += f"\n- multiply-adds at most, GFLOP/s: {', '.join(f'{p:.0f}' for p in peaks)}"
    notes = "\n".join(f"- {row.case}: {row.notes}" for row in rows if row.notes)
    text = (
        f"# {title}\n\n{head}\n- a plain copy in the same process: {copy:.1f} GB/s "
        f"(read + write, not counting that it also reads the lines it writes)\n\n"
        f"{table(rows, copy)}\n\n{notes}\n"
    )
    (where / f"{title}.md").write_text(text.rstrip() + "\n")


def draw(title: str, rows: list[Row], copy: float, where: Path, device: str) -> None:
    """The pictures: <title>.png, and -bandwidth and -accuracy if there is any to be seen."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: they need matplotlib, pip install 'fastmp[train]'", file=sys.stderr)
        return
    heading = f"{title}: {device_name(device)}, {date.today().isoformat()}"
    pictures.ratios(where / f"{title}.png", heading, rows)
    pictures.bandwidth(where / f"{title}-bandwidth.png", heading, rows, copy)
    pictures.accuracy(where / f"{title}-accuracy.png", heading, rows)
