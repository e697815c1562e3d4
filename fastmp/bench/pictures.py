"""Pictures of results: ratio bars, bandwidth against size, accuracy against seconds.

Each function writes a file, or none where no row has such data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmp.bench.harness import OURS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUR_COLOR = "#2f6f9f"
COLORS = ("#c0392b", "#8e8e8e", "#d68910", "#5b8c5a", "#8e5ea2", "#333333")


def ratios(path: Path, heading: str, rows: list[Row]) -> None:
    """Bars: how many times faster than the best baseline; a tick at the goal."""
    figure, (axes,) = _axes(1, (9, 1.3 + 0.42 * len(rows)))
    ys = list(range(len(rows)))[::-1]
    axes.barh(ys, [row.ratio for row in rows], color=OUR_COLOR, height=0.62)
    for y, row in zip(ys, rows, strict=True):
        goal = row.goals.get("best", row.goals.get(row.baseline))
        text = f" {row.ratio:.2f}x  vs {row.baseline}"
        axes.text(max(row.ratio, goal or 0), y, text, va="center", size=8)
        if goal is not None:
            axes.plot([goal] * 2, [y - 0.4, y + 0.4], color=COLORS[0], lw=2)
    axes.axvline(1, color="#333333", lw=1, ls=":")
    axes.set_yticks(ys, [row.case for row in rows], size=8)
    axes.set_xlim(0, max(row.ratio for row in rows) * 2.2)  # beside the bar its text
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("times faster than the best baseline (red: goal)")
    _save(figure, path, heading)


def bandwidth(path: Path, heading: str, rows: list[Row], copy: float) -> None:
    """A line for each candidate of a series: fastmp's bytes over its time, against those bytes."""
    series = _series(rows)
    if not series:
        return
    figure, panels = _axes(len(series), (9, 3.4 * len(series)))
    for axes, (name, members) in zip(panels, series.items(), strict=True):
        colors = _colors(members)
        for candidate, color in colors.items():
            points = sorted(
                (row.bytes_moved / 1e6, row.bytes_moved / row.timings[candidate].median / 1e6)
                for row in members
                if candidate in row.timings
            )
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=candidate, ms=4)
        axes.axhline(copy, color="#333333", lw=1, ls=":")
        axes.text(0.995, copy, "a plain copy ", transform=axes.get_yaxis_transform(),
                  ha="right", va="bottom", size=8)  # fmt: skip
        axes.set_xscale("log")
        axes.set_ylim(0)
        axes.set_xlabel("MB that fastmp moves", size=8)
        axes.set_ylabel("those bytes over the time, GB/s", size=8)
        axes.set_title(name, size=9, loc="left")
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path, heading)


def accuracy(path: Path, heading: str, rows: list[Row]) -> None:
    """A panel for each training run: test accuracy against seconds, a line for each candidate."""
    shown = [row for row in rows if row.curves]
    if not shown:
        return
    figure, panels = _axes(len(shown), (9, 3.2 * len(shown)))
    for axes, row in zip(panels, shown, strict=True):
        for candidate, color in _colors([row]).items():
            points = row.curves[candidate]
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=candidate, ms=3)
        axes.set_xlim(0)
        axes.set_xlabel("seconds of training", size=8)
        axes.set_ylabel("test accuracy", size=8)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_title(row.case, size=9, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path, heading)


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """The members of each series of more than one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.series:
            groups.setdefault(row.series, []).append(row)
    return {name: members for name, members in groups.items() if len(members) > 1}


def _colors(rows: list[Row]) -> dict[str, str]:
    others = list(dict.fromkeys(name for row in rows for name in row.timings if name != OURS))
    return {OURS: OUR_COLOR} | {n: COLORS[i % len(COLORS)] for i, n in enumerate(others)}


def _axes(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made: Any = plt.subplots(count, figsize=size, layout="constrained", squeeze=False)
    return made[0], list(made[1][:, 0])


def _save(figure: Figure, path: Path, heading: str) -> None:
    from matplotlib import pyplot as plt

    figure.suptitle(heading, size=10, x=0.01, ha="left")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
