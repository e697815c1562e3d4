"""How everything here is timed, and how results are written.

All candidates of a case run in one process, interleaved, in a new order every round, so that a
noisy neighbour, a changed clock or the caches left by the one before hit them alike; medians with
p20 and p80; the fastest baseline is the baseline. A case asserts that all candidates computed the
same thing on the very tensors it timed.
"""

from __future__ import annotations

import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

import fastmp
from fastmp.backends import cpu

OURS = "fastmp"
RESULTS = Path(__file__).parent / "results"


@dataclass
class Timing:
    """Milliseconds of one candidate."""

    median: float
    p20: float
    p80: float


@dataclass
class Row:
    """One case: what was timed, for how long, and the ratio asked for."""

    subject: str
    case: str
    timings: dict[str, Timing]
    bytes_moved: int  # by fastmp, from the formula at the head of its source; 0: not its bound
    goals: dict[str, float]  # baseline -> at least this ratio; "best": against the fastest
    share: float = 0.0  # of a plain copy's rate, at least; 0: not asked for
    notes: str = ""
    operations: int = 0  # of fastmp, where they are its bound
    peak: float = 0.0  # GFLOP/s that the machine can do of them; 0: not measured
    ratios: dict[str, float] = field(default_factory=dict)
    baseline: str = ""
    gigabytes_per_second: float = 0.0
    gigaflops: float = 0.0

    def __post_init__(self) -> None:
        ours = self.timings[OURS].median
        others = {k: t.median for k, t in self.timings.items() if k != OURS}
        self.ratios = {name: ms / ours for name, ms in others.items()}
        self.baseline = min(others, key=lambda name: others[name])
        self.gigabytes_per_second = self.bytes_moved / ours / 1e6
        self.gigaflops = self.operations / ours / 1e6

    @property
    def ratio(self) -> float:
        return self.ratios[self.baseline]

    def reached(self, copy: float) -> bool:
        """Whether everything asked for was reached; copy: GB/s of a plain copy."""
        fast = all(reached >= goal for _, reached, goal in self.verdicts())
        return fast and self.gigabytes_per_second >= self.share * copy

    def rate(self, copy: float) -> str:
        """What was reached of what the machine can do; copy: GB/s of a plain copy."""
        if not self.operations:
            return f"{self.gigabytes_per_second:.1f} GB/s ({self.gigabytes_per_second / copy:.0%})"
        share = f" ({self.gigaflops / self.peak:.0%})" if self.peak else ""
        return f"{self.gigaflops:.0f} GFLOP/s{share}"

    def verdicts(self) -> list[tuple[str, float, float]]:
        """(baseline, ratio reached, ratio asked for)."""
        return [
            (self.baseline if name == "best" else name, self.ratios.get(name, self.ratio), goal)
            for name, goal in self.goals.items()
        ]


def wall_time(run: Callable[[], object]) -> float:
    """Milliseconds by the clock on the wall."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


class DeviceTime:
    """Milliseconds on the GPU, from a cache that holds nothing of the candidate's.

    Writing 512 MB takes the GPU 0.1 ms; meanwhile the host gets ahead with its launches.
    """

    def __init__(self) -> None:
        self._other_data = torch.empty(128 << 20, dtype=torch.float32, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other_data.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleave(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    label: str,
    measure: Callable[[Callable[[], object]], float] = wall_time,
) -> dict[str, Timing]:
    """Median milliseconds of each candidate over interleaved rounds, two of warm-up before."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    order = random.Random(0)
    for number in tqdm(range(rounds + 2), desc=label, leave=False, disable=None):
        order.shuffle(names)
        for name in names:
            elapsed = measure(candidates[name])
            if number >= 2:
                samples[name].append(elapsed)
    timings = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=5)
        timings[name] = Timing(statistics.median(values), cuts[0], cuts[-1])
    return timings


def rounds_within(candidates: dict[str, Callable[[], object]], seconds: float) -> int:
    """How many rounds fit into that time, 5 to 61; runs each candidate twice."""
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for candidate in candidates.values():
            candidate()
    return max(5, min(61, round(seconds / (time.perf_counter() - start))))


def copy_bandwidth(
    elements: int = 50_000_000,
    device: str = "cpu",
    measure: Callable[[Callable[[], object]], float] = wall_time,
) -> float:
    """GB/s of a plain copy, read + write, in this process."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, 9, "copy", measure)["copy"]
    return source.numel() * 8 / timing.median / 1e6


# ---- where and with what ----


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "backend": cpu.load()[1],
        "python": platform.python_version(),
        "reports": "; ".join(
            f"{s.op}: {s.backend}" for s in fastmp.backends.report() if s.device == device
        ),
    }


# ---- results ----


def folder() -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", environment()["device"].lower()).strip("-")
    path = RESULTS / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def table(rows: list[Row], copy: float) -> str:
    """The rows in Markdown; bytes moved are held against copy, the GB/s of a plain copy."""
    lines = [
        "| case | fastmp, ms (p20 to p80) | best baseline, ms | ratio | asked | rate (of bound) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, best = row.timings[OURS], row.timings[row.baseline]
        asked = ", ".join(
            f"{goal:g}x {name}: {reached:.2f}x {'reached' if reached >= goal else '**missed**'}"
            for name, reached, goal in row.verdicts()
        )
        if row.share:
            enough = row.gigabytes_per_second >= row.share * copy
            asked += f"; {row.share:.0%} of a copy: {'reached' if enough else '**missed**'}"
        lines.append(
            f"| {row.case} | {ours.median:.2f} ({ours.p20:.2f} to {ours.p80:.2f}) "
            f"| {best.median:.2f} ({row.baseline}) | **{row.ratio:.2f}x** | {asked or '-'} "
            f"| {row.rate(copy)} |"
        )
    return "\n".join(lines)


def write(
    subject: str, rows: list[Row], copy: float, where: Path | None = None, device: str = "cpu"
) -> Path:
    """Write <subject>.json, <subject>.md and <subject>.png; return the folder."""
    where, facts = where or folder(), environment(device)
    content = {**facts, "copy_gigabytes_per_second": copy, "rows": [asdict(row) for row in rows]}
    (where / f"{subject}.json").write_text(json.dumps(content, indent=1) + "\n")
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    peaks = sorted({row.peak for row in rows if row.peak})
    if peaks:
        head += f"\n- multiply-adds at most, GFLOP/s: {', '.join(f'{p:.0f}' for p in peaks)}"
    notes = "\n".join(f"- {row.case}: {row.notes}" for row in rows if row.notes)
    text = (
        f"# {subject}\n\n{head}\n- a plain copy in the same process: {copy:.1f} GB/s "
        f"(read + write, "
        f"not counting that it also reads the lines it writes)\n\n{table(rows, copy)}\n\n{notes}\n"
    )
    (where / f"{subject}.md").write_text(text.rstrip() + "\n")
    _picture(where / f"{subject}.png", subject, rows, facts)
    return where


def _picture(path: Path, subject: str, rows: list[Row], facts: dict[str, str]) -> None:
    """Bars: how many times faster than the best baseline; a tick where the goal is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.42 * len(rows)), layout="constrained")
    places = range(len(rows))[::-1]
    axes.barh(list(places), [row.ratio for row in rows], color="#2f6f9f", height=0.62)
    for place, row in zip(places, rows, strict=True):
        axes.text(row.ratio, place, f" {row.ratio:.2f}x  vs {row.baseline}", va="center", size=8)
        goal = row.goals.get("best", row.goals.get(row.baseline))
        if goal is not None:
            axes.plot([goal] * 2, [place - 0.4, place + 0.4], color="#c0392b", lw=2)
    axes.axvline(1, color="#333333", lw=1, ls=":")
    axes.set_yticks(list(places), [row.case for row in rows], size=8)
    axes.set_xlim(0, max(row.ratio for row in rows) * 1.45)
    axes.set_xlabel("times faster than the best baseline (red: asked for)")
    axes.set_title(f"{subject}: {facts['device']}, {facts['date']}", size=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
