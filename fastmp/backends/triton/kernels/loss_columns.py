"""The gradient of some columns of the logits, in their place, where each row's sums are known.

For row n and class c = first + column::

    grad_c = scale_n exp(z_c - row_max_n) - smooth_coef_n w_c, or what is given where c is a target

Bytes, 16-bit logits: 2 read and 2 written. A program takes 2,048 columns of one row, 16 logits a
thread: two 16-byte loads before the first is used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.triton.kernels.numerics import exp

_BLOCK, _WARPS = 2048, 4


@triton.jit(do_not_specialize=["n", "first"])  # the last part has other sizes: one binary for all
def _columns_kernel(
    logits,  # (N, n)
    rows,  # (N, 5): row_max, scale, smooth_coef, gradients at both targets
    target_a,  # (N)
    target_b,  # (N), None: one target
    weight,  # (C), None: all 1
    n, first, ignore_index, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK)
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = o_c < n // VECTOR * VECTOR if VECTOR > 1 else o_c < n
    p_z = logits + i_n * (n // VECTOR * VECTOR) + o_c
    b_z = tl.load(p_z, mask=mask, other=0.0).to(tl.float32)
    row_max = tl.load(rows + 5 * i_n)
    scale = tl.load(rows + 5 * i_n + 1)
    smooth_coef = tl.load(rows + 5 * i_n + 2)
    if weight is not None:
        smooth_coef *= tl.load(weight + first + o_c, mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(scale == 0.0, 0.0, scale * exp(b_z - row_max) - smooth_coef)
    y = tl.load(target_a + i_n)
    column = tl.where(y == ignore_index, -1, y - first)
    grad = tl.where(o_c == column, tl.load(rows + 5 * i_n + 3), grad)
    if target_b is not None:
        y = tl.load(target_b + i_n)
        column = tl.where(y == ignore_index, -1, y - first)
        grad = tl.where(o_c == column, tl.load(rows + 5 * i_n + 4), grad)
    tl.store(p_z, grad.to(logits.dtype.element_ty), mask=mask)


def columns(
    logits: Tensor,
    rows: Tensor,
    first: int,
    target_a: Tensor,
    target_b: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
) -> None:
    """``fastmp::loss_columns_`` of dense logits that are not empty."""
    count, n = logits.shape
    widest = 16 // logits.element_size()
    vector = widest if n % widest == 0 and logits.data_ptr() % 16 == 0 else 1
    _columns_kernel[(count * triton.cdiv(n, _BLOCK),)](
        logits, rows.contiguous(), target_a.contiguous(),
        None if target_b is None else target_b.contiguous(),
        None if weight is None else weight.contiguous(),
        n, first, ignore_index, BLOCK=_BLOCK, VECTOR=vector, num_warps=_WARPS,
    )  # fmt: skip
