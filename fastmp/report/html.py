"""The report of a run: one HTML file with numbers, curves, overflows, recipe, environment."""

from __future__ import annotations

import base64
import datetime
import html
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastmp.training import log

FILE = "report.html"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .sub { opacity: .7; margin-top: 0; }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none; }
.numbers li { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; }
.numbers b { display: block; font-size: 1.15rem; } .numbers span { opacity: .7; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; background: #fff; }
pre { background: var(--soft); border-radius: .5rem; padding: 1rem; overflow-x: auto; }
"""
_HEADLINES = 4  # of the facts; the others are a table


def environment(device: torch.device) -> dict[str, str]:
    """What a run depended on besides its recipe."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": where,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "fastmp": version("fastmp"),
        "PyTorch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "CPU threads": str(torch.get_num_threads()),
    }


def write(folder: Path, title: str, facts: Mapping[str, str], device: torch.device) -> Path:
    """Write ``folder/report.html`` from what lies there; the path of the report.

    Args:
        folder: of the run, with ``metrics.jsonl``; ``curves.png`` and ``config.toml`` if they are
            there.
        title: of the page.
        facts: by name, the most important first.
        device: where the run was.
    """
    path = folder / log.FILE
    rows = list(facts.items())
    head = "".join(f"<li><span>{_(name)}</span><b>{_(v)}</b></li>" for name, v in rows[:_HEADLINES])
    sections = [
        ("Curves", _curves(folder)),
        ("Epochs", _epochs(log.read(path, "epoch"))),
        ("Overflows", _overflows(log.read(path, "overflow"))),
        ("Telemetry", _telemetry(log.read(path, "telemetry"))),
        ("More", _table(["", ""], rows[_HEADLINES:])),
        ("Recipe", _recipe(folder / "config.toml")),
        ("Environment", _table(["", ""], environment(device).items())),
    ]
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections if content)
    resumed = [row["step"] for row in log.read(path, "resumed")]
    note = f", resumed at step {', '.join(map(str, resumed))}" if resumed else ""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{_(title)}</h1>"
        f'<p class="sub">{_(str(folder))}{_(note)}</p><ul class="numbers">{head}</ul>{body}'
        "</body></html>"
    )
    report = folder / FILE
    report.write_text(page, encoding="utf-8")
    return report


def _(text: Any) -> str:
    return html.escape(str(text))


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    body = ["<tr>" + "".join(f"<td>{_(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not body:
        return ""
    top = "".join(f"<th>{_(name)}</th>" for name in head) if any(head) else ""
    return f"<table><tr>{top}</tr>{''.join(body)}</table>"


def _curves(folder: Path) -> str:
    picture = folder / "curves.png"
    if not picture.exists():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="curves of the run" src="data:image/png;base64,{data}">'


def _epochs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>No epoch was finished.</p>"
    head = ["epoch", "training loss", "test loss", "accuracy", "seconds", "samples/s"]
    return _table(
        head,
        (
            (
                row["epoch"],
                _number(row["train_loss"], ".4f"),
                _number(row["val_loss"], ".4f"),
                _number(row["val_accuracy"], ".2%"),
                _number(row["seconds"], ".1f"),
                _number(row["samples_per_second"], ",.0f"),
            )
            for row in rows
        ),
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _overflows(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>None: every gradient of every step was finite.</p>"
    head = ["step", "first parameter with a gradient that was not finite; nothing was changed"]
    return _table(head, ((row["step"], row["parameter"]) for row in rows))


def _telemetry(rows: list[dict[str, Any]]) -> str:
    """The mean over the run, as shares of all gradient elements."""
    if not rows:
        return ""
    total = sum(row["gradients"] for row in rows)
    names = [name for name in rows[0] if name not in ("kind", "step", "gradients")]
    shares = [(name, sum(row[name] for row in rows) / max(total, 1)) for name in names]
    head = ["counted", "share of all gradient elements"]
    return _table(head, ((name.replace("_", " "), f"{share:.4%}") for name, share in shares))


def _recipe(path: Path) -> str:
    return f"<pre>{_(path.read_text(encoding='utf-8'))}</pre>" if path.exists() else ""


def _processor() -> str:
    """The CPU's name where the system tells it (Linux)."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
