"""A training step of MLPs whose act(z) is kept, or computed again in the backward.

    python -m benchmarks.experiments.recompute [--device cpu] [--steps 20]

Eight blocks of layer norm, linear, gelu, linear and a residual connection, in turn both ways in one
process: median milliseconds, of processor time on a CPU, and the peak memory on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from torch import Tensor, nn

import fastmp
from benchmarks.experiments import save
from fastmp.ops import linear as operation

SHAPES = {  # tokens, width
    "cpu": ((1576, 384), (394, 768)),
    "cuda": ((16384, 384), (16384, 768), (16384, 1024)),
}


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) to the same."""
        y: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return y


def measured(
    tokens: int, width: int, dtype: torch.dtype, device: str, steps: int
) -> dict[str, float]:
    """Milliseconds of either way, their ratio, and on a GPU the peak MB."""
    model = fastmp.convert(nn.Sequential(*(Block(width) for _ in range(8))).to(device), dtype)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {"kept": [], "computed again": []}
    results: dict[str, float] = {}
    for i in range(steps + 3):
        for way, found in times.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with mock.patch.object(operation, "recomputes_input", return_value=way != "kept"):
                started = clock()
                y = model(x)
                y.backward(x)
                if device == "cuda":
                    torch.cuda.synchronize()
                    results[f"{way}, peak MB"] = torch.cuda.max_memory_allocated() / 1e6
            if i >= 3:
                found.append(1e3 * (clock() - started))
            model.zero_grad()
    results |= {f"{way}, ms": statistics.median(found) for way, found in times.items()}
    results["ratio"] = results["computed again, ms"] / results["kept, ms"]
    return results


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = {}
    for tokens, width in SHAPES[args.device]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            label = f"{tokens} x {width}, {str(dtype)[6:]}"
            rows[label] = measured(tokens, width, dtype, args.device, args.steps)
            print(label, {name: round(value, 3) for name, value in rows[label].items()}, flush=True)
    lines = ["| | " + " | ".join(next(iter(rows.values()))) + " |"]
    lines.append("|---" * (len(next(iter(rows.values()))) + 1) + "|")
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    save("recompute", {"rows": rows}, ["", *lines])


if __name__ == "__main__":
    main()
