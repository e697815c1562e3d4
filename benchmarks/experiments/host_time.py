"""Host time of an optimizer step: as many tensors as ResNet-50 has, 161, of 4 elements each.

    python -m benchmarks.experiments.host_time [--before CHECKOUT] [--rounds 5]

AdamW with clipping on one thread; zero_grad and new gradients before every step, from the allocator
as in a training loop. ``CHECKOUT`` is another one of the project, with its native library, measured
in turn; its folder is named by its commit. The least of the rounds counts, each the lowest decile
of its steps: all else is the noise of other processes. Below it the profile of a step: its Python
functions' own time, by cProfile, in the fastest 30 of 600 steps.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments import save
from fastmp import optim

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = Path(__file__).parents[2]
STEPS = 600
LISTED = 12


class Loop:
    """A loop whose steps are timed, or profiled, and nothing else of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._params = [torch.randn(4).to(dtype).requires_grad_() for _ in range(161)]
        self._grads = [torch.randn(4).to(dtype) for _ in self._params]
        self._optimizer = optim.AdamW(self._params, lr=1e-3, max_grad_norm=1.0)

    def backward(self) -> None:
        self._optimizer.zero_grad()
        for param, grad in zip(self._params, self._grads, strict=True):
            param.grad = grad.clone()

    def microseconds(self) -> float:
        times = []
        for _ in range(STEPS):
            self.backward()
            started = time.perf_counter()
            self._optimizer.step()
            times.append(time.perf_counter() - started)
        return 1e6 * sorted(times[50:])[len(times[50:]) // 10]

    def profile(self) -> list[tuple[str, float]]:
        """Functions and their own microseconds a step, the longest first."""
        self.backward()
        self._optimizer.step()  # the first one lays the table out
        profiles = [self._profiled(STEPS // 20) for _ in range(20)]
        fastest = min(profiles, key=lambda rows: sum(own for _, own in rows))
        return sorted(fastest, key=lambda row: -row[1])[:LISTED]

    def _profiled(self, steps: int) -> list[tuple[str, float]]:
        profiler = cProfile.Profile()
        for _ in range(steps):
            self.backward()
            profiler.enable()
            self._optimizer.step()
            profiler.disable()
        stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        return [(_name(where), 1e6 * own / steps) for where, (_, _, own, _, _) in stats.items()]


def _name(where: tuple[str, int, str]) -> str:
    file, _, function = where
    return function if file == "~" else f"{Path(file).parent.name}/{Path(file).name}: {function}"


def in_checkout(folder: Path) -> dict[str, float]:
    """Microseconds a step by dtype, in a process that imports fastmp from ``folder``."""
    code = (
        "import json, torch; from host_time import DTYPES, Loop; torch.set_num_threads(1);"
        "print(json.dumps({str(d)[6:]: Loop(d).microseconds() for d in DTYPES}))"
    )
    paths = [str(folder), str(HERE), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sides = {"before": options.before, "now": HERE} if options.before else {"now": HERE}
    measured = [{k: in_checkout(v) for k, v in sides.items()} for _ in range(options.rounds)]
    rows = {
        str(d)[6:]: {side: min(m[side][str(d)[6:]] for m in measured) for side in sides}
        for d in DTYPES
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    profile = Loop(torch.float32).profile()
    torch.set_num_threads(threads)
    lines = [
        "\nA step of 161 tensors of 4 elements, AdamW with clipping, microseconds of the host."
        + (f" Before: {options.before.name}." if options.before else "")
        + "\n",
        f"| | {' | '.join(sides)} | ratio |",
        "| --- |" + " --- |" * (len(sides) + 1),
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{value:.0f}" for value in row.values())
        ratio = f"{row['now'] / row['before']:.2f}" if "before" in row else ""
        lines.append(f"| {name} | {cells} | {ratio} |")
    lines += [
        f"\nIts profile in fp32, own time under cProfile, in the fastest 30 of {STEPS} steps:\n",
        "| function | µs |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {value:.1f} |" for name, value in profile]
    save("host-time", {"rows": rows, "profile": profile}, lines)


if __name__ == "__main__":
    main()
