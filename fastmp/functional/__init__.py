"""The operations as functions: ``linear``, ``cross_entropy``, both in one, and ``mix``."""

from __future__ import annotations

from fastmp.functional.cross_entropy import cross_entropy
from fastmp.functional.linear import linear
from fastmp.functional.linear_cross_entropy import linear_cross_entropy
from fastmp.functional.mix import mix
from fastmp.ops.loss import MixedTarget

__all__ = ["MixedTarget", "cross_entropy", "linear", "linear_cross_entropy", "mix"]
