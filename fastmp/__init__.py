"""Mixed-precision training for PyTorch on hand-written kernels."""

from fastmp import amp, backends, optim
from fastmp.amp import convert

__all__ = ["amp", "backends", "convert", "optim"]
