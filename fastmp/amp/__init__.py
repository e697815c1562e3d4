"""Precision policy: the loss scaler and the conversion of a model to 16-bit weights."""

from __future__ import annotations

from fastmp.amp.convert import convert
from fastmp.amp.grad_scaler import GradScaler

__all__ = ["GradScaler", "convert"]
