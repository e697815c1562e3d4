"""The operations as functions: ``linear``, ``cross_entropy`` and ``mix``."""

from __future__ import annotations

from fastmp.functional.cross_entropy import cross_entropy
from fastmp.functional.linear import linear
from fastmp.ops.loss import MixedTarget
from fastmp.ops.mix import mix

__all__ = ["MixedTarget", "cross_entropy", "linear", "mix"]
