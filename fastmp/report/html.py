"""The report of a run: one HTML file with numbers, curves, classes, mistakes and the recipe."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmp.training import log
from fastmp.training.confusion import Confusion

FILE = "report.html"
_HEADLINES = ("val accuracy", "best epoch", "train loss", "training time", "speed", "parameters")
_MOST_CLASSES = 30  # of a confusion matrix; of more classes the most frequent mistakes are listed
_PAIRS = 15


@dataclass(frozen=True)
class Page:
    """The contents of a report that are in no file of the run.

    ``facts``: results by name. ``environment``: device, date and versions. ``commands``: the line
    that started the run and those that resumed it. ``data``: sizes and classes of the data set.
    ``recipe``: the settings that had an effect. ``classes`` and ``confusion``: of the validation.
    """

    title: str
    facts: Mapping[str, str]
    environment: Mapping[str, str]
    commands: Sequence[str] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    confusion: Confusion | None = None


def write(folder: Path, page: Page) -> Path:
    """Write ``folder/report.html`` from the log of the run and ``page``; the path of the report."""
    import jinja2  # 0.1 s, once a run

    rows: dict[str, list[dict[str, Any]]] = {}
    for row in log.read(folder / log.FILE):
        rows.setdefault(row["kind"], []).append(row)
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("fastmp", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = _number
    epochs = rows.get("epoch", [])
    text = pages.get_template(f"{FILE}.jinja").render(
        page=page,
        folder=folder,
        headlines=[(name, page.facts[name]) for name in _HEADLINES if name in page.facts],
        facts=[(name, fact) for name, fact in page.facts.items() if name not in _HEADLINES],
        curves=_curves(folder, page.title) if rows.get("step") else {},
        epochs=epochs,
        validated=any(row["val_accuracy"] is not None for row in epochs),
        best=_best(epochs),
        overflows=rows.get("overflow", []),
        resumed=[row["step"] for row in rows.get("resumed", [])],
        telemetry=_telemetry(rows.get("telemetry", [])),
        **_classes(page),
    )
    report = folder / FILE
    report.write_text(text, encoding="utf-8")
    return report


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _best(epochs: list[dict[str, Any]]) -> int | None:
    """The number of the epoch with the highest accuracy; of several the latest."""
    scores = [(row["val_accuracy"], row["epoch"]) for row in epochs if row["val_accuracy"]]
    return max(scores)[1] if scores else None


def _telemetry(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The sums over the run, as shares of all gradient elements."""
    total = max(sum(row["gradients"] for row in rows), 1)
    names = [name for row in rows[:1] for name in row if name not in ("kind", "step", "gradients")]
    return {name.replace("_", " "): sum(row[name] for row in rows) / total for name in names}


def _curves(folder: Path, title: str) -> dict[str, str]:
    """The picture for light and for dark pages, as data URIs; none without Matplotlib."""
    try:
        from fastmp.report import curves
    except ImportError:
        return {}
    drawn = {}
    for theme in curves.THEMES:
        buffer = io.BytesIO()
        curves.draw(folder, title, theme=theme, file=buffer)
        drawn[theme] = _uri(buffer.getvalue())
    return drawn


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# ---- classes and mistakes ----


def _classes(page: Page) -> dict[str, Any]:
    found, names = page.confusion, page.classes
    if found is None:
        return {"per_class": [], "matrix": [], "pairs": [], "mistakes": []}
    per_class = [(n, *row) for n, row in zip(names, found.per_class(), strict=True)]
    few = len(names) <= _MOST_CLASSES
    rows = found.counts.tolist() if few else []
    matrix = [
        (name, [(n, n / max(sum(row), 1), i == j) for j, n in enumerate(row)])
        for i, (name, row) in enumerate(zip(names, rows, strict=False))
    ]
    pairs = [] if few else [(names[i], names[j], n) for i, j, n in found.most_confused(_PAIRS)]
    mistakes = [
        (_picture(m.image), names[m.label], names[m.predicted], m.probability)
        for m in found.worst
        if m.image.dim() == 3 and m.image.shape[0] in (1, 3)
    ]
    return {"per_class": per_class, "matrix": matrix, "pairs": pairs, "mistakes": mistakes}


def _picture(image: Tensor) -> str:
    """A PNG of pixels (C, H, W): uint8 as they are, normalised ones from the least to the most."""
    pixels = image.float()
    low, high = (0.0, 255.0) if image.dtype.itemsize == 1 else (pixels.min(), pixels.max())
    shares = ((pixels - low) / max(float(high - low), 1e-9)).clamp(0, 1)
    colours = (shares.expand(3, -1, -1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    height, width, _ = colours.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in colours.contiguous())
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a sample, RGB
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return _uri(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts))


def _chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, content, CRC (W3C PNG, section 5.3)."""
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
