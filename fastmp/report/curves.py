"""One picture of a run: loss, accuracy, learning rate, loss scale, gradient norm, skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from fastmp.training import log

BLUE, ORANGE, GREY, RED = "#2563a8", "#d9692a", "#8a8f98", "#c0262d"
_SHORT = 40  # points of a line that are also drawn as dots

#: Colours of the page, the text and the grid, and of the four lines.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#ffffff", "text": "#1c1e21", "grid": "#e6e8eb",
        "blue": BLUE, "orange": ORANGE, "grey": GREY, "red": RED,
    },
    "dark": {
        "page": "#121212", "text": "#e4e6ea", "grid": "#33363b",
        "blue": "#6aa9ec", "orange": "#f0935c", "grey": "#9aa0aa", "red": "#f0616a",
    },
}  # fmt: skip
Rows = list[dict[str, Any]]
Style = dict[str, Any]


def draw(
    folder: Path, title: str, *, theme: str = "light", file: BinaryIO | None = None
) -> Path | None:
    """Draw ``folder/curves.png`` from ``folder/metrics.jsonl``; the path of the picture.

    A run that was stopped has a picture too, even before the end of its first epoch.

    Args:
        folder: of the run.
        title: of the picture.
        theme: of ``THEMES``.
        file: where the picture goes instead; then there is no path.

    Raises:
        ValueError: no step was logged.
    """
    path = folder / log.FILE
    steps, epochs = log.read(path, "step"), log.read(path, "epoch")
    if not steps:
        raise ValueError(f"{path} holds no step; expected at least one")
    colours = THEMES[theme]
    names: dict[Any, str] = {
        "figure.facecolor": "page", "axes.facecolor": "page", "savefig.facecolor": "page",
        "text.color": "text", "axes.titlecolor": "text", "axes.labelcolor": "text",
        "axes.edgecolor": "grey", "xtick.color": "text", "ytick.color": "text",
    }  # fmt: skip
    with rc_context({name: colours[colour] for name, colour in names.items()}):
        figure = _figure(steps, epochs, title, colours)
        target = folder / "curves.png"
        figure.savefig(target if file is None else file, dpi=130, format="png")
    return target if file is None else None


def _figure(steps: Rows, epochs: Rows, title: str, colours: dict[str, str]) -> Figure:
    figure = Figure(figsize=(11, 7), layout="constrained")  # no pyplot: no display, no global state
    (loss, accuracy), (rate, norm) = figure.subplots(2, 2, sharex=True)
    _draw_loss(loss, steps, epochs, colours)
    _draw_accuracy(accuracy, epochs, colours)
    _draw_rate(rate, steps, colours)
    _draw_norm(norm, steps, colours)
    last = steps[-1]["step"]
    for axes in (loss, accuracy, rate, norm):
        axes.grid(color=colours["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, last + max(1, 0.02 * last))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (rate, norm):
        axes.set_xlabel("step")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    return figure


def _legend(axes: Axes) -> None:
    """Above the lines, on the right of the title."""
    axes.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, borderaxespad=0
    )


def _marker(points: int) -> str:
    """Dots make the points of a short line visible: one alone has no line."""
    return "o" if points <= _SHORT else ""


def _column(rows: Rows, name: str) -> np.ndarray:
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


def _draw_loss(axes: Axes, steps: Rows, epochs: Rows, colours: dict[str, str]) -> None:
    at, loss = _column(steps, "step"), _column(steps, "loss")
    axes.set_title("loss", loc="left")
    style: Style = {"color": colours["blue"], "marker": _marker(len(at)), "markersize": 3}
    if len(at) > _SHORT:
        axes.plot(at, loss, color=colours["blue"], alpha=0.25, linewidth=0.8)
        axes.plot(at, _smooth(loss), linewidth=1.8, label="training, smoothed", **style)
    else:
        axes.plot(at, loss, linewidth=1.8, label="training", **style)
    val = _column(epochs, "val_loss")
    if np.isfinite(val).any():
        style = {"color": colours["orange"], "marker": "o", "markersize": 4}
        axes.plot(_column(epochs, "step"), val, label="val", **style)
    _legend(axes)


def _draw_accuracy(axes: Axes, epochs: Rows, colours: dict[str, str]) -> None:
    at, accuracy = _column(epochs, "step"), _column(epochs, "val_accuracy") * 100
    if not np.isfinite(accuracy).any():
        axes.set_title("val accuracy, %", loc="left")
        reason = "there was no validation" if epochs else "no epoch was finished"
        axes.text(0.5, 0.5, reason, ha="center", transform=axes.transAxes)
        return
    axes.set_title(f"val accuracy: {accuracy[-1]:.2f} %", loc="left")
    axes.plot(at, accuracy, color=colours["orange"], marker="o", markersize=4)
    best = len(accuracy) - 1 - int(np.nanargmax(accuracy[::-1]))
    if best < len(accuracy) - 1:
        axes.set_title(
            f"best {accuracy[best]:.2f} in epoch {epochs[best]['epoch']}",
            loc="right",
            fontsize="medium",
            color=colours["orange"],
        )
    if len(at) == 1:  # around one point Matplotlib's axis has no round numbers
        axes.set_ylim(max(0, accuracy[0] - 10), min(100, accuracy[0] + 10))


def _draw_rate(axes: Axes, steps: Rows, colours: dict[str, str]) -> None:
    at, scale = _column(steps, "step"), _column(steps, "scale")
    style: Style = {"color": colours["blue"], "marker": _marker(len(at)), "markersize": 3}
    axes.plot(at, _column(steps, "lr"), linewidth=1.8, **style)
    axes.set_title("learning rate", loc="left", color=colours["blue"])
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if (scale != 1).any():
        other = axes.twinx()
        other.plot(at, scale, color=colours["grey"], linewidth=1.4, drawstyle="steps-post")
        other.set_yscale("log", base=2)
        low, high = np.log2(scale.min()), np.log2(scale.max())
        exponents = np.unique(np.linspace(low - 1, high + 1, 5).round())
        other.set_yticks(2.0**exponents)
        other.set_ylim(2.0 ** (low - 1.2), 2.0 ** (high + 1.2))
        other.minorticks_off()
        other.set_title("loss scale", loc="right", color=colours["grey"])
        other.spines[["top"]].set_visible(False)


def _draw_norm(axes: Axes, steps: Rows, colours: dict[str, str]) -> None:
    at, norm = _column(steps, "step"), _column(steps, "grad_norm")
    skipped = np.array([row["skipped"] for row in steps], dtype=bool)
    axes.set_title("gradient norm before clipping", loc="left")
    style: Style = {"color": colours["blue"], "marker": _marker(len(at)), "markersize": 3}
    if len(at) > _SHORT:
        axes.plot(at, norm, color=colours["blue"], alpha=0.25, linewidth=0.8)
    axes.plot(at, _smooth(norm) if len(at) > _SHORT else norm, linewidth=1.8, **style)
    known = norm[np.isfinite(norm) & (norm > 0)]
    if len(known) and known.max() > 4 * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if skipped.any():
        for position in at[skipped]:
            axes.axvline(position, color=colours["red"], linewidth=1.0, alpha=0.7)
        steps_ = "step" if skipped.sum() == 1 else "steps"
        axes.plot([], [], color=colours["red"], label=f"{skipped.sum()} skipped {steps_}")
        _legend(axes)
