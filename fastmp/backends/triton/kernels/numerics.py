"""Functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.knobs import runtime

_INTERPRETED = tl.constexpr(bool(runtime.interpret))


@triton.jit
def exp(x):
    """e^x as 2^(x log2 e): one instruction, which flushes subnormal results to 0.

    ``tl.exp`` keeps them, with three instructions more.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(v):
    """1 / v to 1.2e-7 in one instruction, 0 where that is subnormal; a division takes 9."""
    if _INTERPRETED:  # it has no PTX
        return 1.0 / v
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1
        )
