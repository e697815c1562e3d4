"""Forward and backward of the loss, a row at a time in each program. Formulas: ``loss.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.early import allow_next_launch, wait_for_previous_launch
from fastmp.backends.triton.kernels.loss_divisor import per_divisor, store_sums, wanted_rows
from fastmp.backends.triton.kernels.loss_gradient import store_gradient
from fastmp.backends.triton.kernels.loss_row import (
    Softmax,
    add_rest,
    block_weights,
    load_block,
    locate,
    peeled,
    softmax_of_block,
    sums_of_row,
    update_edges,
    update_vectors,
    vector_of,
    widen,
)
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
def _load_pair(y_a, y_b, lam_n, weight, per_a, per_b, row, C, ignore_index, PAIR: tl.constexpr):
    """Targets a and b of a row, and the larger one and the other."""
    if PAIR:
        a = load_target(y_a, weight, row.p_row, lam_n * per_a, C, ignore_index)
        b = load_target(y_b, weight, row.p_row, (1.0 - lam_n) * per_b, C, ignore_index)
        t, other = larger_first(a, b)
    else:
        a = load_target(y_a, weight, row.p_row, per_a, C, ignore_index)
        b = Target(a.y, a.w * 0.0, a.m & False, per_a * 0.0, a.z)
        t, other = a, b
    return a, b, t, other


@triton.jit
def _load_row(logits, stride_logits, target_a, target_b, lam, stride_lam, i_n, N, C,
              BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr,
              BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Row N - 1 - i_n: its block, if BLOCK, targets and λ."""
    o_n = (N - 1 - i_n).to(tl.int64)
    row = locate(logits, stride_logits, o_n, C, VECTOR, PEEL)
    block = load_block(row, 0, BLOCK_C, VECTOR, WHOLE) if BLOCK else 0
    y_a = load_index(target_a, o_n, None, 0)
    y_b = load_index(target_b, o_n, None, 0) if target_b is not None else y_a
    return block, y_a, y_b, load_number(lam, stride_lam, o_n, None)


@triton.jit
def _softmax(block, weight, t, row, DTYPE: tl.constexpr, C, SMOOTH: tl.constexpr,
             BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr,
             ON_CHIP: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The sums of a row; of one on the chip also its exp(z - block_max) and block_max."""
    WEIGHTED: tl.constexpr = weight is not None
    b_e = 0.0
    if ON_CHIP:
        b_w = block_weights(weight, row, 0, BLOCK_C)
        s, b_e = softmax_of_block(widen(block, DTYPE, BLOCK_C), b_w, t, row, VECTOR, SMOOTH,
                                  WEIGHTED, WHOLE)  # fmt: skip
    else:
        lowest = tl.full((BLOCK_C // VECTOR,), float("-inf"), tl.float32)
        zeros = tl.zeros((BLOCK_C // VECTOR,), tl.float32)
        i_t = vector_of(t, row, VECTOR)
        vectors = Softmax(lowest, zeros, zeros, zeros)
        for i_c in tl.range(0, tl.cdiv(C, BLOCK_C), num_stages=3):
            b_z = load_block(row, i_c, BLOCK_C, 1, WHOLE).to(tl.float32)
            b_w = block_weights(weight, row, i_c, BLOCK_C)
            vectors = update_vectors(vectors, b_z, b_w, i_c, i_t, row, VECTOR, SMOOTH, WEIGHTED,
                                     WHOLE)  # fmt: skip
        s = add_rest(sums_of_row(vectors), t, i_t, row, VECTOR)
    block_max = s.row_max
    if PEEL:
        o_c, mask = peeled(row, C, VECTOR)
        s = update_edges(s, row, weight, o_c, mask, t, SMOOTH)
    return s, b_e, block_max


@triton.jit
def forward_kernel(
    logits, stride_logits,  # (N, C)
    target_a,  # (N)
    target_b,  # (N), None: one target
    lam, stride_lam,  # (N), or () with stride 0, or a number with None
    weight,  # (C), None: all 1
    weight_total,  # (): Σw, None without weight
    grad_output, stride_grad_output,  # () with stride 0, or a number with None; None: 1
    partial,  # (1 or 2 targets, PARTIALS), None: no row is ignored
    loss,  # (N), None: sums
    sums,  # (4, programs), None: loss
    stats,  # (N + 1, 2): row_max, others
    grad,  # (N, C), None: the loss alone
    N, C, ignore_index, target_prob, smooth_prob, MEAN: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr, ON_CHIP: tl.constexpr,
    WHOLE: tl.constexpr, PREFETCH: tl.constexpr, IN_PLACE: tl.constexpr, PARTIALS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of each row; with grad also the gradient, for this grad_output."""
    allow_next_launch(EARLY)
    wait_for_previous_launch(EARLY)
    PAIR: tl.constexpr = target_b is not None
    WEIGHTED: tl.constexpr = weight is not None
    per_a, per_b = per_divisor(partial, N, MEAN, PAIR, PARTIALS)
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    g = load_number(grad_output, stride_grad_output, 0, None)
    sum_a, sum_b, weight_a, weight_b = 0.0, 0.0, 0.0, 0.0
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    ahead = _load_row(logits, stride_logits, target_a, target_b, lam, stride_lam, pid, N, C,
                      BLOCK_C, VECTOR, PEEL, PREFETCH, WHOLE)  # fmt: skip
    for i_n in tl.range(pid, N, step):
        block, y_a, y_b, lam_n = ahead
        ahead = _load_row(logits, stride_logits, target_a, target_b, lam, stride_lam,
                          tl.where(i_n + step < N, i_n + step, i_n), N, C, BLOCK_C, VECTOR, PEEL,
                          PREFETCH, WHOLE)  # fmt: skip
        o_n = (N - 1 - i_n).to(tl.int64)
        row = locate(logits, stride_logits, o_n, C, VECTOR, PEEL)
        if ON_CHIP and not PREFETCH:
            block = load_block(row, 0, BLOCK_C, VECTOR, WHOLE)
        a, b, t, other = _load_pair(y_a, y_b, lam_n, weight, per_a, per_b, row, C, ignore_index,
                                    PAIR)  # fmt: skip
        s, b_e, block_max = _softmax(block, weight, t, row, logits.dtype.element_ty, C, SMOOTH,
                                     BLOCK_C, VECTOR, PEEL, ON_CHIP, WHOLE)  # fmt: skip
        tl.store(stats + 2 * o_n, s.row_max)
        tl.store(stats + 2 * o_n + 1, s.others)
        loss_a, loss_b = pair_losses(a, b, t, lam_n, s, weight_total, target_prob, smooth_prob,
                                     PAIR, SMOOTH)  # fmt: skip
        if loss is not None:
            tl.store(loss + o_n, loss_a + loss_b)
        else:
            sum_a += loss_a
            sum_b += loss_b
            weight_a += counted(a, WEIGHTED)
            weight_b += counted(b, WEIGHTED)
        if grad is not None:
            k = coefficients(t, other, g, s.row_max, s.others, weight_total, target_prob,
                             smooth_prob)  # fmt: skip
            store_gradient(grad, o_n, row, b_e, block_max, weight, t, other, k, s.row_max, C, PAIR,
                           SMOOTH, BLOCK_C, VECTOR, PEEL, ON_CHIP, WHOLE, IN_PLACE)  # fmt: skip
    store_sums(sums, stats, N, sum_a, sum_b, weight_a, weight_b)


@triton.jit
def backward_kernel(
    logits, stride_logits,  # (N, C)
    target_a,  # (N)
    target_b,  # (N), None: one target
    lam, stride_lam,  # (N), or () with stride 0, or a number with None
    weight,  # (C), None: all 1
    weight_total,  # (): Σw, None without weight
    grad_output, stride_grad_output,  # (N), or () with stride 0
    assumed_grad_output, stride_assumed,  # () with stride 0, or a number with None; None: 1
    stats,  # (N + 1, 2): row_max, others; the divisors
    grad,  # (N, C)
    N, C, ignore_index, target_prob, smooth_prob, MEAN: tl.constexpr, SMOOTH: tl.constexpr,
    CHECK: tl.constexpr, ASSUMED: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
    PEEL: tl.constexpr, ON_CHIP: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The gradient, from stats; with CHECK only if an assumption of the forward was wrong."""
    allow_next_launch(EARLY)
    wait_for_previous_launch(EARLY)
    PAIR: tl.constexpr = target_b is not None
    per_a, per_b, wanted = wanted_rows(
        grad_output, stride_grad_output, assumed_grad_output, stride_assumed, stats, N, MEAN,
        CHECK, ASSUMED)  # fmt: skip
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    for i_n in tl.range(tl.program_id(0), wanted, tl.num_programs(0)):
        block, y_a, y_b, lam_n = _load_row(
            logits, stride_logits, target_a, target_b, lam, stride_lam, i_n, N, C, BLOCK_C, VECTOR,
            PEEL, ON_CHIP, WHOLE)  # fmt: skip
        o_n = (N - 1 - i_n).to(tl.int64)
        row = locate(logits, stride_logits, o_n, C, VECTOR, PEEL)
        _, _, t, other = _load_pair(y_a, y_b, lam_n, weight, per_a, per_b, row, C, ignore_index,
                                    PAIR)  # fmt: skip
        row_max = tl.load(stats + 2 * o_n)
        others = tl.load(stats + 2 * o_n + 1)
        b_e = exp(widen(block, logits.dtype.element_ty, BLOCK_C) - row_max) if ON_CHIP else 0.0
        g = load_number(grad_output, stride_grad_output, o_n, None)
        k = coefficients(t, other, g, row_max, others, weight_total, target_prob, smooth_prob)
        store_gradient(grad, o_n, row, b_e, row_max, weight, t, other, k, row_max, C, PAIR, SMOOTH,
                       BLOCK_C, VECTOR, PEEL, ON_CHIP, WHOLE)  # fmt: skip
