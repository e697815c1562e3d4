"""Kernels, one folder for each backend, and the registry that selects them."""

from __future__ import annotations

from fastmp.backends.registry import OpBackend, report

__all__ = ["OpBackend", "report"]
