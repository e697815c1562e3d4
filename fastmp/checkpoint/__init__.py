"""Checkpoints without pickle: ``save`` and ``load`` of nested state, bit for bit."""

from __future__ import annotations

from fastmp.checkpoint.format import CheckpointError, load, save

__all__ = ["CheckpointError", "load", "save"]
