"""Longer experiments, `make gpu-check`, and results by device; `fastmp bench` is in the package."""
