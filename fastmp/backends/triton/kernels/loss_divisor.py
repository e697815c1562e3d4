"""The divisors of the mean, and the loss from the sums of the programs. Formulas: ``loss.py``.

The forward assumes that no row is ignored, so that the divisor is the number of rows: counting them
first would be a launch and a pass over the targets. It counts as it goes. ``finish_kernel`` divides
the loss by the right divisors and leaves them for the backward, which writes the gradient again
where they are others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.early import allow_next_launch, wait_for_previous_launch
from fastmp.backends.triton.kernels.loss_target import load_number


@triton.jit
def divisor_kernel(
    target_a,  # (N)
    target_b,  # (N), None: one target
    weight,  # (C), None: all 1
    partial,  # (1 or 2 targets, PARTIALS)
    N, C, ignore_index, PARTIALS: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """partial[t, i] = Σ w_y of target t, over program i's rows that are not ignored."""
    allow_next_launch(EARLY)
    wait_for_previous_launch(EARLY)
    target = target_a
    if target_b is not None:
        target = target_a if tl.program_id(1) == 0 else target_b
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK_N, N, PARTIALS * BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        y = tl.load(target + o_n, mask=o_n < N, other=ignore_index)
        m = y != ignore_index
        if weight is not None:
            m_valid = m & (y >= 0) & (y < C)
            sums += tl.load(weight + y, mask=m_valid, other=0.0).to(tl.float32)
        else:
            sums += m.to(tl.float32)
    tl.store(partial + tl.program_id(1) * PARTIALS + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def per_divisor(partial, N, MEAN: tl.constexpr, PAIR: tl.constexpr, PARTIALS: tl.constexpr):
    """1 / divisor_a and 1 / divisor_b; without partial of N rows, none of which is ignored."""
    per_a = 1.0
    per_b = 1.0
    if MEAN:
        if partial is not None:
            per_a = 1.0 / tl.sum(tl.load(partial + tl.arange(0, PARTIALS)), 0)
            if PAIR:
                per_b = 1.0 / tl.sum(tl.load(partial + PARTIALS + tl.arange(0, PARTIALS)), 0)
        else:
            per_a = 1.0 / (N * 1.0)
            per_b = per_a
    return per_a, per_b


@triton.jit
def store_sums(sums, stats, N, sum_a, sum_b, weight_a, weight_b):
    """A program's sums; without sums the divisors are 1."""
    if sums is not None:
        p_sums = sums + tl.program_id(0)
        programs = tl.num_programs(0)
        tl.store(p_sums, sum_a)
        tl.store(p_sums + programs, sum_b)
        tl.store(p_sums + 2 * programs, weight_a)
        tl.store(p_sums + 3 * programs, weight_b)
    else:
        p_divisors = stats + 2 * (N + tl.zeros((), tl.int64))
        tl.store(p_divisors, 1.0)
        tl.store(p_divisors + 1, 1.0)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def finish_kernel(
    sums,  # (4, P)
    loss,  # ()
    stats,  # (N + 1, 2)
    N, P, PAIR: tl.constexpr, MEAN: tl.constexpr, WEIGHTED: tl.constexpr, ASSUMED: tl.constexpr,
    BLOCK_P: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The loss from the sums of the programs, and its divisors into the last row of stats.

    They are negative where the gradient was written for another divisor, the number of rows.
    """
    wait_for_previous_launch(EARLY)
    zeros = tl.zeros((BLOCK_P,), tl.float32)
    sum_a, sum_b, weight_a, weight_b = zeros, zeros, zeros, zeros
    for start in tl.range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        sum_a += tl.load(sums + o_p, mask=m_p, other=0.0)
        weight_a += tl.load(sums + 2 * P + o_p, mask=m_p, other=0.0)
        if PAIR:
            sum_b += tl.load(sums + P + o_p, mask=m_p, other=0.0)
            weight_b += tl.load(sums + 3 * P + o_p, mask=m_p, other=0.0)
    total_a, total_b, divisor_a, divisor_b = tl.reduce(
        (sum_a, sum_b, weight_a, weight_b), 0, _add_four
    )
    if MEAN:
        if not WEIGHTED:
            divisor_a = (N - divisor_a.to(tl.int64)).to(tl.float32)
            divisor_b = (N - divisor_b.to(tl.int64)).to(tl.float32)
    else:
        divisor_a, divisor_b = 1.0, 1.0
    total = total_a / divisor_a
    if PAIR:
        total += total_b / divisor_b
    tl.store(loss, total)
    if ASSUMED:
        divisor_a = tl.where(divisor_a == N, divisor_a, -divisor_a)
        divisor_b = tl.where(divisor_b == N, divisor_b, -divisor_b)
    p_divisors = stats + 2 * (N + tl.zeros((), tl.int64))
    tl.store(p_divisors, divisor_a)
    tl.store(p_divisors + 1, divisor_b)


@triton.jit
def wanted_rows(grad_output, stride_grad_output, assumed_grad_output, stride_assumed, stats, N,
                 MEAN: tl.constexpr, CHECK: tl.constexpr, ASSUMED: tl.constexpr):  # fmt: skip
    """1 / divisor_a, 1 / divisor_b, and N, or 0 where the forward's assumptions were right."""
    p_divisors = stats + 2 * (N + tl.zeros((), tl.int64))
    divisor_a = tl.load(p_divisors) if MEAN else 1.0
    divisor_b = tl.load(p_divisors + 1) if MEAN else 1.0
    per_a = 1.0 / (tl.abs(divisor_a) if ASSUMED else divisor_a)
    per_b = 1.0 / (tl.abs(divisor_b) if ASSUMED else divisor_b)
    wanted = N
    if CHECK:
        assumed = load_number(assumed_grad_output, stride_assumed, 0, None)
        wrong = load_number(grad_output, stride_grad_output, 0, None) != assumed
        if ASSUMED:
            wrong = wrong | (divisor_a < 0) | (divisor_b < 0)
        wanted = tl.where(wrong, N, 0)
    return per_a, per_b, wanted
