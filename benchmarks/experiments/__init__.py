"""Experiments of minutes to hours, each a command: accuracy, convergence, transfer, overhead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmp.bench.results import folder
from fastmp.report.environment import environment

RESULTS = Path(__file__).parents[1] / "results"


def save(title: str, content: dict[str, Any], lines: Iterable[str]) -> None:
    """Write <title>.json and <title>.md to the device's folder, and print the second."""
    facts, where = environment(), folder(RESULTS)
    (where / f"{title}.json").write_text(json.dumps({**facts, **content}, indent=1) + "\n")
    head = [f"# {title}\n", *(f"- {key}: {value}" for key, value in facts.items())]
    text = "\n".join([*head, *lines]) + "\n"
    (where / f"{title}.md").write_text(text)
    print(text)
