"""Rows of the loss: their targets, their online softmax and their gradient. Formulas: ``loss.py``.

Offsets are o_, masks m_, loaded blocks b_; _n are the rows of a tile (BLOCK_N), _c classes, _v the
16-byte vectors of a block (BLOCK_V = BLOCK_C / VECTOR). A vector lies in one thread: a decision for
all of it (is it in the row? is the target in it?) costs an eighth of an instruction a logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.numerics import exp


class Rows(NamedTuple):
    """Rows of a matrix (N, C), whole 16-byte vectors of each apart from the rest."""

    o_n: Any  # (BLOCK_N), int64
    m_n: Any  # (BLOCK_N)
    p_row: Any  # (BLOCK_N)
    p_body: Any  # (BLOCK_N, 1): the first 16-byte boundary
    prologue: Any  # (BLOCK_N): elements before it
    body: Any  # (BLOCK_N): elements of the vector body


class Block(NamedTuple):
    """The vector bodies of rows that stay in registers."""

    b_z: Any  # (BLOCK_N, BLOCK_C): logits, or their exponentials
    b_w: Any  # (BLOCK_N, BLOCK_C): class weights, or 1
    mask: Any  # (BLOCK_N, BLOCK_C)


class Target(NamedTuple):
    """One target of every row, each field (BLOCK_N): the one with the larger logit, or the other.

    Where both are one class, the larger has the weight of both and the other is none.
    """

    y: Any
    w: Any  # class weight
    m: Any  # False: ignored
    mix_weight: Any  # infinite where all are ignored: the mean is NaN
    z: Any  # the target's logit


class Softmax(NamedTuple):
    """Running sums over the logits read so far, each field (BLOCK_N); or (BLOCK_N, BLOCK_V)."""

    row_max: Any
    others: Any  # Σ exp(z - row_max) without the larger target
    smooth_sum: Any  # Σ w (row_max - z)
    weight_sum: Any  # Σ w


@triton.jit
def locate(x, stride, o_n, m_n, C, VECTOR: tl.constexpr, PEEL: tl.constexpr):
    """Rows of x. Offsets are multiples of VECTOR in their arithmetic: the compiler then knows.

    With PEEL a row has elements before its first 16-byte boundary and after its last.
    """
    if PEEL:
        start = o_n * stride
        boundary = tl.cdiv(start, VECTOR) * VECTOR
        body = (start + C - boundary).to(tl.int32) // VECTOR * VECTOR
    else:
        start = o_n * (stride // VECTOR * VECTOR)
        boundary = start
        body = tl.zeros_like(o_n).to(tl.int32) + C // VECTOR * VECTOR
    p_row = x + start
    p_body = x + boundary[:, None]
    return Rows(o_n, m_n, p_row, p_body, (boundary - start).to(tl.int32), body)


@triton.jit
def peeled(rows, C, VECTOR: tl.constexpr):
    """Offsets and mask of the classes in prologue and tail."""
    lane = tl.arange(0, 2 * VECTOR)[None, :]
    o_c = tl.where(lane < VECTOR, lane, (rows.prologue + rows.body)[:, None] + lane - VECTOR)
    return o_c, o_c < tl.where(lane < VECTOR, rows.prologue[:, None], C)


@triton.jit
def _load_target(target, weight, rows, C, ignore_index):
    """Class index, weight and mask. An index out of range weighs NaN: loud, and no crash."""
    y = tl.load(target + rows.o_n, mask=rows.m_n, other=ignore_index)
    m = y != ignore_index
    m_valid = m & (y >= 0) & (y < C)
    y = tl.where(m_valid, y, 0).to(tl.int32)
    w = tl.where(m, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + y, mask=m_valid, other=0.0).to(tl.float32)
    return y, tl.where(m & ~m_valid, float("nan"), w), m


@triton.jit
def load_targets(target_a, target_b, lam, stride_lam, weight, divisor_a, divisor_b, rows, C,
                 ignore_index):  # fmt: skip
    """The larger target and the other one, which is none without target_b."""
    y_a, w_a, m_a = _load_target(target_a, weight, rows, C, ignore_index)
    z_a = tl.load(rows.p_row + y_a, mask=m_a, other=0.0).to(tl.float32)
    if target_b is not None:
        y_b, w_b, m_b = _load_target(target_b, weight, rows, C, ignore_index)
        z_b = tl.load(rows.p_row + y_b, mask=m_b, other=0.0).to(tl.float32)
        lam_n = tl.load(lam + rows.o_n * stride_lam, mask=rows.m_n, other=0.0)
        mix_a = lam_n / divisor_a
        mix_b = (1.0 - lam_n) / divisor_b
        both = m_a & m_b & (y_a == y_b) & (w_a == w_b)  # not NaN, which is out of range
        mix_a += tl.where(both, mix_b, 0.0)
        mix_b = tl.where(both, 0.0, mix_b)
        m_b = m_b & ~both
        swap = m_b & (~m_a | (z_b > z_a))
        return (
            Target(tl.where(swap, y_b, y_a), tl.where(swap, w_b, w_a), m_a | m_b,
                   tl.where(swap, mix_b, mix_a), tl.where(swap, z_b, z_a)),
            Target(tl.where(swap, y_a, y_b), tl.where(swap, w_a, w_b), m_a & m_b,
                   tl.where(swap, mix_a, mix_b), tl.where(swap, z_a, z_b)),
        )  # fmt: skip
    else:
        mix_a = tl.zeros_like(w_a) + 1.0 / divisor_a
        none = Target(y_a, tl.zeros_like(w_a), m_a & False, tl.zeros_like(w_a), z_a)
        return Target(y_a, w_a, m_a, mix_a, z_a), none


@triton.jit
def load_grad_output(grad_output, stride, rows):
    """(BLOCK_N); 1 without grad_output."""
    if grad_output is not None:
        return tl.load(grad_output + rows.o_n * stride, mask=rows.m_n, other=0.0)
    else:
        return tl.where(rows.m_n, 1.0, 0.0)


@triton.jit
def _load_logits(p_z, mask, WHOLE: tl.constexpr = False):
    """In fp32; -inf where masked, neutral to a maximum and to a sum. WHOLE: nothing is masked."""
    if WHOLE:
        return tl.load(p_z).to(tl.float32)
    else:
        return tl.load(p_z, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _load_class_weights(weight, o_c, mask):
    """w of these classes; 1 without class weights."""
    if weight is not None:
        return tl.load(weight + o_c, mask=mask, other=0.0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def load_block(rows, weight, i_c, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr):
    """Block i_c of the vector bodies. ON_CHIP is the caller's: Triton 3.6 cannot return None."""
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = rows.m_n[:, None] & (o_c < rows.body[:, None])
    b_z = _load_logits(rows.p_body + o_c, mask, WHOLE)
    b_w = _load_class_weights(weight, rows.prologue[:, None] + o_c, mask)
    return Block(b_z, b_w, mask)


@triton.jit
def exp_block(block, row_max):
    """The block with exp(z - row_max) in place of z."""
    return Block(exp(block.b_z - row_max[:, None]), block.b_w, block.mask)


# ---- loss ----


@triton.jit
def _finite(row_max):
    """What logits are taken against: not -inf, so that exp(-inf) is 0 and not NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _vectors(x, VECTOR: tl.constexpr):
    """(BLOCK_N, BLOCK_C) as (BLOCK_N, BLOCK_V, VECTOR)."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // VECTOR, VECTOR))


@triton.jit
def vector_of(t, rows, VECTOR: tl.constexpr):
    """(BLOCK_N): the vector of the body with the larger target, -1 where it is not in the body."""
    o_c = t.y - rows.prologue
    return tl.where((o_c >= 0) & (o_c < rows.body), o_c // VECTOR, -1)


@triton.jit
def _sums_of_vectors(e, below, b_w, i_c, i_t, rows, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
                     WHOLE: tl.constexpr):  # fmt: skip
    """Σ e, Σ -w below, Σ w of each vector of block i_c; vector i_t, if given, has a Σ e of 0."""
    BLOCK_V: tl.constexpr = e.shape[1]
    VECTOR: tl.constexpr = e.shape[2]
    i_v = i_c * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    others = tl.sum(e, 2)
    if i_t is not None:
        others = tl.where(i_v == i_t[:, None], 0.0, others)
    smooth_sum = tl.zeros_like(others)
    weight_sum = tl.zeros_like(others)
    if SMOOTH:
        if WEIGHTED:
            smooth_sum -= tl.sum(_vectors(b_w, VECTOR) * below, 2)
            weight_sum += tl.sum(_vectors(b_w, VECTOR), 2)
        else:
            smooth_sum -= tl.sum(below, 2)
            weight_sum += VECTOR
        if not WHOLE:
            m_v = rows.m_n[:, None] & (i_v * VECTOR < rows.body[:, None])
            smooth_sum = tl.where(m_v, smooth_sum, 0.0)
            weight_sum = tl.where(m_v, weight_sum, 0.0)
    return others, smooth_sum, weight_sum


@triton.jit
def _raised(s, row_max):
    """smooth_sum against another row_max."""
    return s.smooth_sum + tl.where(s.weight_sum > 0, s.weight_sum * (row_max - s.row_max), 0.0)


@triton.jit
def softmax_of_block(block, t, rows, VECTOR: tl.constexpr, SMOOTH: tl.constexpr,
                     WEIGHTED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The sums over a block that has the whole body, and its exp(z - row_max), with 0 at target t.

    To find t takes two instructions a logit; ``add_rest`` would take as many in a thread of
    32 and wait for a load. Every term of smooth_sum is positive: nothing cancels, however large the
    logits.
    """
    row_max = tl.max(block.b_z, 1)
    below = block.b_z - _finite(row_max)[:, None]
    below = _vectors(below, VECTOR)
    # Against the position within its vector, a constant: 32 classes would take 32 registers.
    o_t = t.y - rows.prologue
    i_v = tl.arange(0, below.shape[1])[None, :]
    lane_t = tl.where(i_v == (o_t // VECTOR)[:, None], (o_t % VECTOR)[:, None], -1)
    lane = tl.arange(0, VECTOR)[None, None, :]
    e = tl.where(lane == lane_t[:, :, None], 0.0, exp(below))
    others, smooth_sum, weight_sum = _sums_of_vectors(
        e, below, block.b_w, 0, None, rows, SMOOTH, WEIGHTED, WHOLE)  # fmt: skip
    s = Softmax(row_max, tl.sum(others, 1), tl.sum(smooth_sum, 1), tl.sum(weight_sum, 1))
    return s, Block(tl.reshape(e, block.b_z.shape), block.b_w, block.mask)


@triton.jit
def update_vectors(s, block, i_c, i_t, rows, VECTOR: tl.constexpr, SMOOTH: tl.constexpr,
                   WEIGHTED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The sums of each vector with those of block i_c (Milakov & Gimelshein 2018).

    A thread keeps a maximum of its own for each of its vectors: threads meet once a row.
    """
    b_z = _vectors(block.b_z, VECTOR)
    row_max = tl.maximum(s.row_max, tl.max(b_z, 2))
    shift = _finite(row_max)
    below = b_z - shift[:, :, None]
    others, smooth_sum, weight_sum = _sums_of_vectors(
        exp(below), below, block.b_w, i_c, i_t, rows, SMOOTH, WEIGHTED, WHOLE)  # fmt: skip
    others += s.others * exp(s.row_max - shift)
    if SMOOTH:
        smooth_sum += _raised(s, row_max)
        weight_sum += s.weight_sum
    return Softmax(row_max, others, smooth_sum, weight_sum)


@triton.jit
def sums_of_rows(s):
    """The sums of the rows from those of their vectors."""
    row_max = tl.max(s.row_max, 1)
    others = tl.sum(s.others * exp(s.row_max - _finite(row_max)[:, None]), 1)
    smooth_sum = tl.sum(_raised(s, row_max[:, None]), 1)
    return Softmax(row_max, others, smooth_sum, tl.sum(s.weight_sum, 1))


@triton.jit
def add_rest(s, t, i_t, rows, VECTOR: tl.constexpr):
    """The sums with the target's vector i_t, but for the target; from the caches."""
    o_c = i_t[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    mask = rows.m_n[:, None] & (i_t >= 0)[:, None]
    e = exp(_load_logits(rows.p_body + o_c, mask) - _finite(s.row_max)[:, None])
    rest = tl.sum(tl.where(rows.prologue[:, None] + o_c == t.y[:, None], 0.0, e), 1)
    return Softmax(s.row_max, s.others + rest, s.smooth_sum, s.weight_sum)


@triton.jit
def update_edges(s, rows, weight, o_c, mask, t, SMOOTH: tl.constexpr):
    """The sums with prologue and tail, but for the larger target."""
    b_z = _load_logits(rows.p_row[:, None] + o_c, mask)
    row_max = tl.maximum(s.row_max, tl.max(b_z, 1))
    shift = _finite(row_max)
    below = b_z - shift[:, None]
    e = tl.where(o_c == t.y[:, None], 0.0, exp(below))
    others = s.others * exp(s.row_max - shift) + tl.sum(e, 1)
    smooth_sum = s.smooth_sum
    if SMOOTH:
        b_w = _load_class_weights(weight, o_c, mask)
        smooth_sum = _raised(s, row_max) - tl.sum(tl.where(mask, b_w * below, 0.0), 1)
    return Softmax(row_max, others, smooth_sum, s.weight_sum)


@triton.jit
def log_sum_exp(t, row_max, others):
    """log Σ exp(z - row_max), to rounding where it is close to 0: t is the largest, and e_t = 1.

    x log(u) / (u - 1) is log(1 + x), whatever rounding makes of u = 1 + x (W. Kahan).
    """
    u = others + exp(t.z - row_max)
    lse = tl.log(u)
    small = (t.z == row_max) & (u < 2.0)
    return tl.where(small, others * tl.where(u == 1.0, 1.0, lse / (u - 1.0)), lse)


@triton.jit
def target_loss(t, row_max, lse, smooth_loss, target_prob):
    """One target's term of the loss; smooth_loss is the second line of the formula."""
    target_nll = target_prob * t.w * (lse - (t.z - row_max))
    return t.mix_weight * tl.where(t.m, target_nll + smooth_loss, 0.0)


# ---- gradient ----


@triton.jit
def _gradient(b_e, b_w, softmax_coef, smooth_coef, m_n, SMOOTH: tl.constexpr):
    """The formula but for the targets; 0 in ignored rows, which may hold NaN."""
    grad = b_e * softmax_coef[:, None]
    if SMOOTH:
        grad -= smooth_coef[:, None] * b_w
    return tl.where(m_n[:, None], grad, 0.0)


@triton.jit
def _store(p_grad, grad, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(p_grad, grad.to(p_grad.dtype.element_ty))
    else:
        tl.store(p_grad, grad.to(p_grad.dtype.element_ty), mask=mask)


@triton.jit
def _load_and_store_gradient(p_z, p_grad, weight, o_c, mask, row_max, softmax_coef, smooth_coef,
                             m_n, SMOOTH: tl.constexpr, WHOLE: tl.constexpr = False):  # fmt: skip
    b_e = exp(_load_logits(p_z, mask, WHOLE) - row_max[:, None])
    b_w = _load_class_weights(weight, o_c, mask)
    grad = _gradient(b_e, b_w, softmax_coef, smooth_coef, m_n, SMOOTH)
    _store(p_grad, grad, mask, WHOLE)


@triton.jit
def store_gradient(
    grad, rows, block, block_max, weight, weight_total, t, other, grad_output, row_max, others, C,
    target_prob, smooth_prob, PAIR: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr, PEEL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """grad (N, C) of these rows, from the block of their exp(z - block_max) or from memory."""
    mix_t = tl.where(t.m, grad_output * t.mix_weight, 0.0)
    mix_o = tl.where(other.m, grad_output * other.mix_weight, 0.0)
    target_coef = mix_t * target_prob * t.w
    other_coef = mix_o * target_prob * other.w
    smooth_coef = (mix_t + mix_o) * smooth_prob
    e_t = exp(t.z - row_max)
    sum_exp = others + e_t
    softmax_coef = (target_coef + other_coef + smooth_coef * weight_total) / sum_exp
    m_n = t.m
    out = locate(grad, C, rows.o_n, rows.m_n, C, VECTOR, PEEL)
    if block is None or PEEL:
        # Where the gradient takes the place of the logits: every thread has read the target's
        # vector and the edges before one of them is overwritten.
        tl.debug_barrier()
    lane = tl.arange(0, BLOCK_C)[None, :]
    if block is not None:
        coef = softmax_coef * exp(block_max - row_max)
        b_grad = _gradient(block.b_z, block.b_w, coef, smooth_coef, m_n, SMOOTH)
        _store(out.p_body + lane, b_grad, block.mask, WHOLE)
    else:
        blocks = tl.cdiv(C, BLOCK_C)
        for i_c in tl.range(0, blocks, num_stages=3):
            o_c = (blocks - 1 - i_c) * BLOCK_C + lane
            _load_and_store_gradient(
                rows.p_body + o_c, out.p_body + o_c, weight, rows.prologue[:, None] + o_c,
                o_c < rows.body[:, None], row_max, softmax_coef, smooth_coef, m_n, SMOOTH,
                WHOLE)  # fmt: skip
    if PEEL:
        o_c, mask = peeled(rows, C, VECTOR)
        _load_and_store_gradient(rows.p_row[:, None] + o_c, out.p_row[:, None] + o_c, weight, o_c,
                                 mask, row_max, softmax_coef, smooth_coef, m_n, SMOOTH)  # fmt: skip
    # The targets' logits again: to find them among all the others takes three instructions a
    # logit for each. The barrier orders stores of different threads to one address.
    tl.debug_barrier()
    away = other_coef + smooth_coef * (weight_total - t.w)
    towards = target_coef + smooth_coef * t.w
    grad_t = (away * e_t - towards * others) / sum_exp
    tl.store(out.p_row + t.y, grad_t.to(grad.dtype.element_ty), mask=t.m)
    if PAIR:
        grad_o = exp(other.z - row_max) * softmax_coef - smooth_coef * other.w - other_coef
        tl.store(out.p_row + other.y, grad_o.to(grad.dtype.element_ty), mask=other.m)
