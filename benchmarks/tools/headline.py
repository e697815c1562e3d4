"""The README's picture, docs/headline.svg: five figures of benchmarks/results, with their device.

    python -m benchmarks.tools.headline

A figure is the ratio to the fastest baseline of its case. Run it again when the results change.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "headline.svg"
GPU = "nvidia-h200"
CPU = "amd-epyc-zen5-2-threads"


class Headline(NamedTuple):
    """A case of a results file, and how the picture names it and its baseline."""

    file: str
    case: str
    work: str
    baseline: str


HEADLINES = (
    Headline(f"{GPU}/a2c34f2/gpu.json", "whole step, float16, 105 M",
             "Optimizer step, 105 M fp16 weights", "GradScaler + AdamW(fused=True)"),
    Headline(f"{GPU}/15f42a5/gpu.json", "Muon, fp32, ViT-B",
             "Muon's step, ViT-B", "torch.optim.Muon + AdamW(fused)"),
    Headline(f"{GPU}/a2c34f2/gpu.json", "loss, bfloat16, 65536 x 4096",
             "Mixup + smoothing loss, 65536 x 4096", "torch.compile"),
    Headline(f"{CPU}/optimizer.json", "whole step, bfloat16, 50 x 500,000",
             "Optimizer step, 25 M bf16 weights", "GradScaler + AdamW(fused=True)"),
    Headline(f"{CPU}/loss.json", "loss, bfloat16, 512 x 32000",
             "Mixup + smoothing loss, 512 x 32000", "torch.compile"),
)  # fmt: skip
DEVICES = {GPU: "NVIDIA H200", CPU: "AMD EPYC, Zen 5, 2 threads"}
WIDTH, LEFT, ROW, SCALE = 900, 364, 40, 62  # SCALE: pixels of 1x


def row_of(headline: Headline) -> tuple[float, dict[str, str]]:
    """The ratio of a headline, and the facts about its file."""
    content = json.loads((RESULTS / headline.file).read_text())
    (row,) = [r for r in content["rows"] if r["case"] == headline.case]
    return float(row["ratios"][row["baseline"]]), content


def device_of(headline: Headline) -> str:
    """As the picture names it."""
    return next(name for start, name in DEVICES.items() if headline.file.startswith(start))


def svg() -> str:
    """The picture."""
    y, shown = 44, ""
    lines = [_text(20, 26, "Times faster than the best that PyTorch has for the same work", 600)]
    for headline in HEADLINES:
        ratio, _ = row_of(headline)
        device = device_of(headline)
        if device != shown:
            facts = [row_of(other)[1] for other in HEADLINES if device_of(other) == device]
            days = dict.fromkeys(fact["date"].split()[0] for fact in facts)
            commits = dict.fromkeys(fact["commit"] for fact in facts)
            when = f"{device}, {', '.join(days)}, at {' and '.join(commits)}"
            lines.append(_text(20, y + 22, when, 400, "#6b6b6b"))
            y, shown = y + 34, device
        length = ratio * SCALE
        lines += [
            _text(LEFT - 12, y + 18, headline.work, 400, anchor="end"),
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="26" rx="3" fill="#2f6f9f"/>',
            _text(LEFT + length + 8, y + 18, f"{ratio:.2f}x", 600),
            _text(LEFT + length + 62, y + 18, f"vs {headline.baseline}", 400, "#6b6b6b"),
        ]
        y += ROW
    height = y + 26
    axis = f"M{LEFT + SCALE} 50V{y - 8}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="14">',
            "<title>Times faster than the best baseline</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>',
            *lines,
            f'<path d="{axis}" stroke="#333333" stroke-dasharray="2 3"/>',
            _text(LEFT + SCALE, y + 8, "1x", 400, "#6b6b6b", "middle"),
            "</svg>\n",
        ]
    )


def _text(
    x: float, y: float, text: str, weight: int, color: str = "#222222", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.0f}" y="{y}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(svg())
