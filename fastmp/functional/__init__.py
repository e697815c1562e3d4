"""The operations as functions: ``linear``, ``cross_entropy`` and ``mix``."""

from __future__ import annotations

from fastmp.functional.cross_entropy import cross_entropy
from fastmp.functional.linear import linear
from fastmp.functional.mix import mix
from fastmp.ops.loss import MixedTarget

__all__ = ["MixedTarget", "cross_entropy", "linear", "mix"]
