"""Checkpoints without pickle: ``save`` and ``load`` of nested state, bit for bit."""

from __future__ import annotations

from fastmp.checkpoint.format import MANIFEST, CheckpointError, load, save

__all__ = ["MANIFEST", "CheckpointError", "load", "save"]
