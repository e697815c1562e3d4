"""One picture of a run: loss, accuracy, learning rate, loss scale, gradient norm, skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fastmp.training import log

BLUE, ORANGE, GREY, RED = "#2563a8", "#d9692a", "#8a8f98", "#c0262d"


def draw(folder: Path, title: str) -> Path:
    """Draw ``folder/curves.png`` from ``folder/metrics.jsonl``; the path of the picture.

    A run that was stopped has a picture too, even before the end of its first epoch.

    Raises:
        ValueError: no step was logged.
    """
    path = folder / log.FILE
    steps, epochs = log.read(path, "step"), log.read(path, "epoch")
    if not steps:
        raise ValueError(f"{path} holds no step; expected at least one")
    figure = Figure(figsize=(11, 7), layout="constrained")  # no pyplot: no display, no global state
    (loss, accuracy), (rate, norm) = figure.subplots(2, 2, sharex=True)
    _draw_loss(loss, steps, epochs)
    _draw_accuracy(accuracy, epochs)
    _draw_rate(rate, steps)
    _draw_norm(norm, steps)
    for axes in (loss, accuracy, rate, norm):
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.02 * max(steps[-1]["step"], 2))
    for axes in (rate, norm):
        axes.set_xlabel("step")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """One column as fp64; null, which stands for a non-finite number, becomes NaN: a gap."""
    values = [np.nan if row[name] is None else float(row[name]) for row in rows]
    return np.array(values, dtype=np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over the last 4% of the steps, at least 10; without gaps."""
    width = min(len(values), max(10, len(values) // 25))
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel)[: len(values)]
    count = np.convolve(known.astype(float), kernel)[: len(values)]
    mean: np.ndarray = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
    at, loss = _column(steps, "step"), _column(steps, "loss")
    axes.set_title("loss", loc="left")
    axes.plot(at, loss, color=BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(at, _smooth(loss), color=BLUE, linewidth=1.8, label="training, smoothed")
    if epochs:
        axes.plot(
            _column(epochs, "step"),
            _column(epochs, "val_loss"),
            color=ORANGE,
            marker="o",
            markersize=4,
            label="test",
        )
    axes.legend(frameon=False)


def _draw_accuracy(axes: Axes, epochs: list[dict[str, Any]]) -> None:
    axes.set_title("test accuracy, %", loc="left")
    if not epochs:
        axes.text(0.5, 0.5, "no epoch was finished", ha="center", transform=axes.transAxes)
        return
    at, accuracy = _column(epochs, "step"), _column(epochs, "val_accuracy") * 100
    axes.plot(at, accuracy, color=ORANGE, marker="o", markersize=4)
    axes.annotate(
        f"{accuracy[-1]:.2f}",
        (at[-1], accuracy[-1]),
        xytext=(0, -18),
        textcoords="offset points",
        ha="right",
        fontweight="bold",
        color=ORANGE,
    )


def _draw_rate(axes: Axes, steps: list[dict[str, Any]]) -> None:
    at, scale = _column(steps, "step"), _column(steps, "scale")
    axes.plot(at, _column(steps, "lr"), color=BLUE, linewidth=1.8)
    axes.set_title("learning rate", loc="left", color=BLUE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if (scale != 1).any():
        other = axes.twinx()
        other.plot(at, scale, color=GREY, linewidth=1.4, drawstyle="steps-post")
        other.set_yscale("log", base=2)
        other.set_title("loss scale", loc="right", color=GREY)
        other.spines[["top"]].set_visible(False)


def _draw_norm(axes: Axes, steps: list[dict[str, Any]]) -> None:
    at, norm = _column(steps, "step"), _column(steps, "grad_norm")
    skipped = np.array([row["skipped"] for row in steps], dtype=bool)
    axes.set_title("gradient norm before clipping", loc="left")
    axes.plot(at, norm, color=BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(at, _smooth(norm), color=BLUE, linewidth=1.8)
    if np.isfinite(norm).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if skipped.any():
        for position in at[skipped]:
            axes.axvline(position, color=RED, linewidth=1.0, alpha=0.7)
        axes.plot([], [], color=RED, label=f"{skipped.sum()} skipped steps")
        axes.legend(frameon=False)
