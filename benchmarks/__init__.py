"""Longer experiments, `make gpu-check`, and results by device; `fastmp bench` is in the package."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
