"""The report of a run: one HTML file with numbers, curves, overflows, recipe, environment."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmp.training import log

FILE = "report.html"
_HEADLINES = 4  # of the facts; the others are a table


def write(
    folder: Path, title: str, facts: Mapping[str, str], environment: Mapping[str, str]
) -> Path:
    """Write ``folder/report.html`` from the files of the run; the path of the report.

    Args:
        folder: of the run, with ``metrics.jsonl``; ``curves.png`` and ``config.toml`` if they
            exist.
        title: of the page.
        facts: by name, the most important first.
        environment: device, date and versions, by name.
    """
    import jinja2  # 0.1 s, once a run

    rows: dict[str, list[dict[str, Any]]] = {}
    for row in log.read(folder / log.FILE):
        rows.setdefault(row["kind"], []).append(row)
    curves, recipe = folder / "curves.png", folder / "config.toml"
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("fastmp", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = _number
    page = pages.get_template(f"{FILE}.jinja").render(
        title=title,
        folder=folder,
        headlines=list(facts.items())[:_HEADLINES],
        facts=list(facts.items())[_HEADLINES:],
        environment=environment.items(),
        curves=base64.b64encode(curves.read_bytes()).decode() if curves.exists() else None,
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else None,
        epochs=rows.get("epoch", []),
        overflows=rows.get("overflow", []),
        resumed=[row["step"] for row in rows.get("resumed", [])],
        telemetry=_telemetry(rows.get("telemetry", [])),
    )
    report = folder / FILE
    report.write_text(page, encoding="utf-8")
    return report


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _telemetry(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The sums over the run, as shares of all gradient elements."""
    total = max(sum(row["gradients"] for row in rows), 1)
    names = [name for row in rows[:1] for name in row if name not in ("kind", "step", "gradients")]
    return {name.replace("_", " "): sum(row[name] for row in rows) / total for name in names}
