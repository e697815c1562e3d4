"""The gradient of a row of the loss, from its sums. Formulas: ``loss.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.loss_row import (
    block_weights,
    load_class_weights,
    load_logits,
    locate,
    peeled,
)
from fastmp.backends.triton.kernels.numerics import exp


@triton.jit
def _gradient(b_e, b_w, softmax_coef, smooth_coef, SMOOTH: tl.constexpr):
    """The formula but for the targets."""
    grad = b_e * softmax_coef
    if SMOOTH:
        grad -= smooth_coef * b_w
    return grad


@triton.jit
def _store(p_grad, grad, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(p_grad, grad.to(p_grad.dtype.element_ty))
    else:
        tl.store(p_grad, grad.to(p_grad.dtype.element_ty), mask=mask)


@triton.jit
def _load_and_store_gradient(p_z, p_grad, weight, o_c, mask, m, row_max, k,
                             SMOOTH: tl.constexpr, WHOLE: tl.constexpr = False):  # fmt: skip
    b_e = exp(load_logits(p_z, mask, WHOLE) - row_max)
    b_w = load_class_weights(weight, o_c, mask)
    grad = tl.where(m, _gradient(b_e, b_w, k.softmax, k.smooth, SMOOTH), 0.0)
    _store(p_grad, grad, mask, WHOLE)


@triton.jit
def store_gradient(
    grad, i_n, row, b_e, block_max, weight, t, other, k, row_max, C, PAIR: tl.constexpr,
    SMOOTH: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr,
    ON_CHIP: tl.constexpr, WHOLE: tl.constexpr, IN_PLACE: tl.constexpr = False,
):  # fmt: skip
    """Row i_n of grad (N, C), from its b_e = exp(z - block_max) or, not on the chip, from memory.

    Zeros for an ignored row, which may hold NaN.
    """
    out = locate(grad, C, i_n, C, VECTOR, PEEL)
    if IN_PLACE:  # of the logits: every thread has read the targets' vectors and the edges
        tl.debug_barrier()
    lane = tl.arange(0, BLOCK_C)
    if ON_CHIP:
        if t.m:
            b_w = block_weights(weight, row, 0, BLOCK_C)
            coef = k.softmax
            if PEEL:
                coef *= exp(block_max - row_max)
            b_grad = _gradient(b_e, b_w, coef, k.smooth, SMOOTH)
            _store(out.p_body + lane, b_grad, lane < row.body, WHOLE)
        else:
            _store(out.p_body + lane, tl.zeros_like(b_e), lane < row.body, WHOLE)
    else:
        blocks = tl.cdiv(C, BLOCK_C)
        for i_c in tl.range(0, blocks, num_stages=3):
            o_c = (blocks - 1 - i_c) * BLOCK_C + lane
            _load_and_store_gradient(
                row.p_body + o_c, out.p_body + o_c, weight, row.prologue + o_c, o_c < row.body,
                t.m, row_max, k, SMOOTH, WHOLE)  # fmt: skip
    if PEEL:
        o_c, mask = peeled(row, C, VECTOR)
        _load_and_store_gradient(row.p_row + o_c, out.p_row + o_c, weight, o_c, mask, t.m, row_max,
                                 k, SMOOTH)  # fmt: skip
    # The targets' logits again: to find them among all the others takes three instructions a
    # logit for each. The barrier orders stores of different threads to one address.
    tl.debug_barrier()
    tl.store(out.p_row + t.y, k.grad_t.to(grad.dtype.element_ty), mask=t.m)
    if PAIR:
        tl.store(out.p_row + other.y, k.grad_o.to(grad.dtype.element_ty), mask=other.m)
