"""What more than one kernel computes with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x as 2^(x log2 e): one instruction, which flushes what is below 2^-126 to 0.

    ``tl.exp`` keeps such numbers, with three instructions more.
    """
    return tl.exp2(x * 1.4426950408889634)
