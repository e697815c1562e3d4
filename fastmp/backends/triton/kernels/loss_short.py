"""Rows of the loss of up to 32 classes: a thread takes a row. Formulas: ``loss.py``.

Nothing is exchanged between threads, and what there is once a row is computed once. 32 rows of 10
classes in a program of four warps took 1,512 instructions of each warp for 512 logits; here 32 rows
take about 500 of one. The accesses of a warp lie a row apart, and together touch each sector of
32 rows: the first ones load them into the L1, the others find them there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.early import allow_next_launch, wait_for_previous_launch
from fastmp.backends.triton.kernels.loss_divisor import per_divisor, store_sums, wanted_rows
from fastmp.backends.triton.kernels.loss_row import Softmax, finite
from fastmp.backends.triton.kernels.loss_target import (
    Target,
    coefficients,
    counted,
    larger_first,
    load_index,
    load_number,
    load_target,
    pair_losses,
)
from fastmp.backends.triton.kernels.numerics import exp


@triton.jit
def _append(z, z_c):
    z += (z_c,)
    return z


@triton.jit
def _load_classes(p_row, m_n, C: tl.constexpr):
    """The logits of each class as a tuple of (BLOCK_N)."""
    z = ()
    for c in tl.static_range(C):
        z = _append(z, tl.load(p_row + c, mask=m_n, other=0.0).to(tl.float32))
    return z


@triton.jit
def load_rows(logits, stride_logits, target_a, target_b, lam, stride_lam, weight, per_a, per_b,
              o_n, m_n, C: tl.constexpr, ignore_index):  # fmt: skip
    """Logits, targets a and b, and λ."""
    p_row = logits + o_n * stride_logits
    z = _load_classes(p_row, m_n, C)
    y_a = load_index(target_a, o_n, m_n, ignore_index)
    lam_n = load_number(lam, stride_lam, o_n, m_n)
    if target_b is not None:
        y_b = load_index(target_b, o_n, m_n, ignore_index)
        a = load_target(y_a, weight, p_row, lam_n * per_a, C, ignore_index)
        b = load_target(y_b, weight, p_row, (1.0 - lam_n) * per_b, C, ignore_index)
    else:
        a = load_target(y_a, weight, p_row, tl.zeros_like(o_n).to(tl.float32) + per_a, C,
                        ignore_index)  # fmt: skip
        b = Target(a.y, a.w * 0.0, a.m & False, a.mix_weight * 0.0, a.z)
    return z, a, b, lam_n


@triton.jit
def softmax_of_rows(z, weight, t, C: tl.constexpr, SMOOTH: tl.constexpr):
    """The sums of each row."""
    row_max = z[0]
    for c in tl.static_range(1, C):
        row_max = tl.maximum(row_max, z[c])
    shift = finite(row_max)
    others = tl.zeros_like(row_max)
    smooth_sum = tl.zeros_like(row_max)
    for c in tl.static_range(C):
        below = z[c] - shift
        others += tl.where(t.y == c, 0.0, exp(below))
        if SMOOTH:
            w = 1.0 if weight is None else tl.load(weight + c).to(tl.float32)
            smooth_sum -= w * below
    return Softmax(row_max, others, smooth_sum, tl.zeros_like(row_max))


@triton.jit
def store_gradients(grad, z, weight, t, other, k, row_max, o_n, m_n, C: tl.constexpr,
                    SMOOTH: tl.constexpr):  # fmt: skip
    """Rows o_n of grad (N, C)."""
    p_row = grad + o_n * C
    for c in tl.static_range(C):
        b_grad = exp(z[c] - row_max) * k.softmax
        if SMOOTH:
            w = 1.0 if weight is None else tl.load(weight + c).to(tl.float32)
            b_grad -= k.smooth * w
        b_grad = tl.where(t.y == c, k.grad_t, b_grad)
        b_grad = tl.where(other.m & (other.y == c), k.grad_o, b_grad)
        b_grad = tl.where(t.m, b_grad, 0.0)
        tl.store(p_row + c, b_grad.to(grad.dtype.element_ty), mask=m_n)


@triton.jit
def forward_short_kernel(
    logits, stride_logits, target_a, target_b, lam, stride_lam, weight, weight_total, grad_output,
    stride_grad_output, partial, loss, sums, stats, grad, N, C: tl.constexpr, ignore_index,
    target_prob, smooth_prob, MEAN: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIALS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``forward_kernel`` with BLOCK_N rows at a time."""
    allow_next_launch(EARLY)
    wait_for_previous_launch(EARLY)
    PAIR: tl.constexpr = target_b is not None
    WEIGHTED: tl.constexpr = weight is not None
    per_a, per_b = per_divisor(partial, N, MEAN, PAIR, PARTIALS)
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    g = load_number(grad_output, stride_grad_output, 0, None)
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    sum_a, sum_b, weight_a, weight_b = zeros, zeros, zeros, zeros
    step = tl.num_programs(0)
    for i in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), step):
        o_n = tl.cast(i, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        z, a, b, lam_n = load_rows(logits, stride_logits, target_a, target_b, lam, stride_lam,
                                   weight, per_a, per_b, o_n, m_n, C, ignore_index)  # fmt: skip
        if PAIR:
            t, other = larger_first(a, b)
        else:
            t, other = a, b
        s = softmax_of_rows(z, weight, t, C, SMOOTH)
        if grad is not None:
            k = coefficients(t, other, g, s.row_max, s.others, weight_total, target_prob,
                             smooth_prob)  # fmt: skip
            store_gradients(grad, z, weight, t, other, k, s.row_max, o_n, m_n, C, SMOOTH)
        tl.store(stats + 2 * o_n, s.row_max, mask=m_n)
        tl.store(stats + 2 * o_n + 1, s.others, mask=m_n)
        loss_a, loss_b = pair_losses(a, b, t, lam_n, s, weight_total, target_prob, smooth_prob,
                                     PAIR, SMOOTH)  # fmt: skip
        if loss is not None:
            tl.store(loss + o_n, loss_a + loss_b, mask=m_n)
        else:
            sum_a += loss_a
            sum_b += loss_b
            weight_a += tl.where(m_n, counted(a, WEIGHTED), 0.0)
            weight_b += tl.where(m_n, counted(b, WEIGHTED), 0.0)
    store_sums(sums, stats, N, tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(weight_a, 0),
               tl.sum(weight_b, 0))  # fmt: skip


@triton.jit
def backward_short_kernel(
    logits, stride_logits, target_a, target_b, lam, stride_lam, weight, weight_total, grad_output,
    stride_grad_output, assumed_grad_output, stride_assumed, stats, grad, N, C: tl.constexpr,
    ignore_index, target_prob, smooth_prob, MEAN: tl.constexpr, SMOOTH: tl.constexpr,
    CHECK: tl.constexpr, ASSUMED: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``backward_kernel`` with BLOCK_N rows at a time."""
    allow_next_launch(EARLY)
    wait_for_previous_launch(EARLY)
    per_a, per_b, wanted = wanted_rows(
        grad_output, stride_grad_output, assumed_grad_output, stride_assumed, stats, N, MEAN,
        CHECK, ASSUMED)  # fmt: skip
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    for i in tl.range(tl.program_id(0), tl.cdiv(wanted, BLOCK_N), tl.num_programs(0)):
        o_n = tl.cast(i, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        z, a, b, _ = load_rows(logits, stride_logits, target_a, target_b, lam, stride_lam, weight,
                               per_a, per_b, o_n, m_n, C, ignore_index)  # fmt: skip
        if target_b is not None:
            t, other = larger_first(a, b)
        else:
            t, other = a, b
        row_max = tl.load(stats + 2 * o_n, mask=m_n, other=0.0)
        others = tl.load(stats + 2 * o_n + 1, mask=m_n, other=1.0)
        g = load_number(grad_output, stride_grad_output, o_n, m_n)
        k = coefficients(t, other, g, row_max, others, weight_total, target_prob, smooth_prob)
        store_gradients(grad, z, weight, t, other, k, row_max, o_n, m_n, C, SMOOTH)
