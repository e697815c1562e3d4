"""The picture of a learning-rate range test."""

from __future__ import annotations

import math
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmp.report.curves import BLUE, GREY, ORANGE
from fastmp.training.lr_find import Finding


def draw(finding: Finding, path: str | os.PathLike[str]) -> Path:
    """Draw the loss over the lr, with the results of both rules, as a PNG; returns its path."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")  # pyplot has global state
    axes = figure.subplots()
    axes.plot(finding.lrs, finding.losses, color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(finding.lrs, finding.smoothed, color=BLUE, linewidth=1.8, label="smoothed")
    axes.set_xscale("log")
    _limit(axes, finding)
    _mark(axes, finding)
    axes.set_xlabel("learning rate")
    axes.set_title("training loss", loc="left")
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.suptitle("learning-rate range test", fontsize=14, fontweight="bold")
    figure.savefig(path, dpi=130, format="png")
    return Path(path)


def _limit(axes: Axes, finding: Finding) -> None:
    """Fit the axis to the descent, which one diverged loss would flatten to a line."""
    bottom, start = min(finding.losses), max(finding.smoothed[: len(finding.lrs) // 2 + 1])
    height = max(start - bottom, 1e-12)
    axes.set_ylim(bottom - 0.08 * height, start + 0.35 * height)


def _mark(axes: Axes, finding: Finding) -> None:
    """The two rules: the suggestion with a dot on the curve, a tenth of the minimum as a line."""
    tenth = finding.at_minimum / 10
    if tenth >= finding.lrs[0]:
        label = f"a tenth of the minimum: {tenth:.2g}"
        axes.axvline(tenth, color=GREY, linewidth=1.2, linestyle="--", label=label)
    lr = finding.suggestion
    if math.isnan(lr):
        axes.text(0.5, 0.92, "the loss never fell", ha="center", transform=axes.transAxes)
        return
    loss = finding.smoothed[finding.lrs.index(lr)]
    axes.axvline(lr, color=ORANGE, linewidth=1.2)
    axes.plot(
        [lr], [loss], color=ORANGE, marker="o", linestyle="", label=f"fastest descent: {lr:.2g}"
    )
    axes.annotate(
        f"suggestion {lr:.2g}",
        (lr, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontweight="bold",
        color=ORANGE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )
