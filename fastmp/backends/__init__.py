"""The kernels, one folder for each kind of device, and the registry that says which serves what."""

from __future__ import annotations

from fastmp.backends.registry import OpBackend, report

__all__ = ["OpBackend", "report"]
