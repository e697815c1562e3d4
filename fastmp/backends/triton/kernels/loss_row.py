"""A row of the loss: its loads and its online softmax. Formulas: ``loss.py``.

A row is taken by a program: what there is once a row is a scalar, which each thread computes once.
As tensors of one element these came in three layouts, each with loads and arithmetic of its own: a
row of 1,000 classes took 1,048 instructions of a warp. Offsets are o_, masks m_, loaded blocks b_;
_c are classes, _v the 16-byte vectors of a block (BLOCK_V = BLOCK_C / VECTOR). A vector lies in one
thread: a decision for all of it (is it in the row? is the target in it?) costs an eighth of an
instruction a logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.numerics import exp

# -inf twice.
_TWO_BF16, _TWO_FP16 = tl.constexpr(-0x7F0080), tl.constexpr(-0x3FF0400)


class Row(NamedTuple):
    """A row of a matrix (N, C), its whole 16-byte vectors apart from the rest."""

    p_row: Any
    p_body: Any  # the first 16-byte boundary
    prologue: Any  # elements before it
    body: Any  # elements of the vector body


class Softmax(NamedTuple):
    """Running sums over the logits read so far, scalars or (BLOCK_V)."""

    row_max: Any
    others: Any  # Σ exp(z - row_max) without the larger target
    smooth_sum: Any  # Σ w (row_max - z)
    weight_sum: Any  # Σ w


@triton.jit
def locate(x, stride, i_n, C, VECTOR: tl.constexpr, PEEL: tl.constexpr):
    """Row i_n (int64) of x. Offsets are multiples of VECTOR in their arithmetic: the compiler then
    knows.

    With PEEL a row has elements before its first 16-byte boundary and after its last.
    """
    if PEEL:
        start = i_n * stride
        boundary = tl.cdiv(start, VECTOR) * VECTOR
        body = (start + C - boundary).to(tl.int32) // VECTOR * VECTOR
    else:
        start = i_n * (stride // VECTOR * VECTOR)
        boundary = start
        body = C // VECTOR * VECTOR
    return Row(x + start, x + boundary, (boundary - start).to(tl.int32), body)


@triton.jit
def peeled(row, C, VECTOR: tl.constexpr):
    """Offsets and mask of the classes in prologue and tail."""
    lane = tl.arange(0, 2 * VECTOR)
    o_c = tl.where(lane < VECTOR, lane, row.prologue + row.body + lane - VECTOR)
    return o_c, o_c < tl.where(lane < VECTOR, row.prologue, C)


# ---- loads ----


@triton.jit
def load_logits(p_z, mask, WHOLE: tl.constexpr = False):
    """In fp32; -inf where masked, neutral to a maximum and to a sum. WHOLE: nothing is masked."""
    if WHOLE:
        return tl.load(p_z).to(tl.float32)
    else:
        return tl.load(p_z, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def load_class_weights(weight, o_c, mask):
    """w of these classes; 1 without class weights."""
    if weight is not None:
        return tl.load(weight + o_c, mask=mask, other=0.0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def load_block(row, i_c, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr):
    """Block i_c of the vector body, as it is in memory; vectors of 16 bits in pairs, as int32.

    So they take half the registers until ``widen``: a value of 16 bits takes one of its own.
    """
    DTYPE: tl.constexpr = row.p_body.dtype.element_ty
    if VECTOR > 1 and DTYPE.primitive_bitwidth == 16:
        o_c = i_c * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        p_body = row.p_body.to(tl.pointer_type(tl.int32))
        if WHOLE:
            return tl.load(p_body + o_c)
        else:
            lowest = _TWO_BF16 if tl.bfloat16 == DTYPE else _TWO_FP16
            words = row.body // VECTOR * (VECTOR // 2)
            return tl.load(p_body + o_c, mask=o_c < words, other=lowest)
    else:
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        if WHOLE:
            return tl.load(row.p_body + o_c)
        else:
            return tl.load(row.p_body + o_c, mask=o_c < row.body, other=float("-inf"))


@triton.jit
def widen(block, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The block in fp32, by one instruction a logit."""
    if block.dtype == tl.int32:
        if tl.bfloat16 == DTYPE:
            low = (block << 16).to(tl.float32, bitcast=True)
            high = (block & -65536).to(tl.float32, bitcast=True)
        else:
            low = block.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (block >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), (BLOCK_C,))
    else:
        return block.to(tl.float32)


@triton.jit
def block_weights(weight, row, i_c, BLOCK_C: tl.constexpr):
    """Class weights of block i_c; 1 without."""
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return load_class_weights(weight, row.prologue + o_c, o_c < row.body)


# ---- sums ----


@triton.jit
def finite(row_max):
    """What logits are taken against: not -inf, so that exp(-inf) is 0 and not NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _vectors(x, VECTOR: tl.constexpr):
    """(BLOCK_C) as (BLOCK_V, VECTOR)."""
    return tl.reshape(x, (x.shape[0] // VECTOR, VECTOR))


@triton.jit
def vector_of(t, row, VECTOR: tl.constexpr):
    """The vector of the body with the larger target, -1 where it is not in the body."""
    o_c = t.y - row.prologue
    return tl.where((o_c >= 0) & (o_c < row.body), o_c // VECTOR, -1)


@triton.jit
def _sums_of_vectors(e, below, b_w, i_c, i_t, row, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
                     WHOLE: tl.constexpr):  # fmt: skip
    """Σ e, Σ -w below, Σ w of each vector of block i_c; vector i_t has a Σ e of 0."""
    BLOCK_V: tl.constexpr = e.shape[0]
    VECTOR: tl.constexpr = e.shape[1]
    i_v = i_c * BLOCK_V + tl.arange(0, BLOCK_V)
    others = tl.where(i_v == i_t, 0.0, tl.sum(e, 1))
    smooth_sum = tl.zeros_like(others)
    weight_sum = tl.zeros_like(others)
    if SMOOTH:
        if WEIGHTED:
            smooth_sum -= tl.sum(_vectors(b_w, VECTOR) * below, 1)
            weight_sum += tl.sum(_vectors(b_w, VECTOR), 1)
        else:
            smooth_sum -= tl.sum(below, 1)
            weight_sum += VECTOR
        if not WHOLE:
            m_v = i_v * VECTOR < row.body
            smooth_sum = tl.where(m_v, smooth_sum, 0.0)
            weight_sum = tl.where(m_v, weight_sum, 0.0)
    return others, smooth_sum, weight_sum


@triton.jit
def _raised(s, row_max):
    """smooth_sum against another row_max."""
    return s.smooth_sum + tl.where(s.weight_sum > 0, s.weight_sum * (row_max - s.row_max), 0.0)


@triton.jit
def softmax_of_block(b_z, b_w, t, row, VECTOR: tl.constexpr, SMOOTH: tl.constexpr,
                     WEIGHTED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The sums over a block that has the whole body, and its exp(z - row_max).

    Every term of smooth_sum is positive: nothing cancels, however large the logits.
    """
    row_max = tl.max(b_z, 0)
    below = b_z - finite(row_max)
    e = exp(below)
    i_t = vector_of(t, row, VECTOR)
    others, smooth_sum, weight_sum = _sums_of_vectors(
        _vectors(e, VECTOR), _vectors(below, VECTOR), b_w, 0, i_t, row, SMOOTH, WEIGHTED, WHOLE
    )  # fmt: skip
    s = Softmax(row_max, tl.sum(others, 0), tl.sum(smooth_sum, 0), tl.sum(weight_sum, 0))
    return add_rest(s, t, i_t, row, VECTOR), e


@triton.jit
def update_vectors(s, b_z, b_w, i_c, i_t, row, VECTOR: tl.constexpr, SMOOTH: tl.constexpr,
                   WEIGHTED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The sums of each vector with those of block i_c (Milakov & Gimelshein 2018).

    A thread keeps a maximum of its own for each of its vectors: threads meet once a row.
    """
    b_z = _vectors(b_z, VECTOR)
    row_max = tl.maximum(s.row_max, tl.max(b_z, 1))
    shift = finite(row_max)
    below = b_z - shift[:, None]
    others, smooth_sum, weight_sum = _sums_of_vectors(
        exp(below), below, b_w, i_c, i_t, row, SMOOTH, WEIGHTED, WHOLE)  # fmt: skip
    others += s.others * exp(s.row_max - shift)
    if SMOOTH:
        smooth_sum += _raised(s, row_max)
        weight_sum += s.weight_sum
    return Softmax(row_max, others, smooth_sum, weight_sum)


@triton.jit
def sums_of_row(s):
    """The sums of the row from those of its vectors."""
    row_max = tl.max(s.row_max, 0)
    others = tl.sum(s.others * exp(s.row_max - finite(row_max)), 0)
    smooth_sum = tl.sum(_raised(s, row_max), 0)
    return Softmax(row_max, others, smooth_sum, tl.sum(s.weight_sum, 0))


@triton.jit
def add_rest(s, t, i_t, row, VECTOR: tl.constexpr):
    """The sums with the target's vector i_t, but for the target; from the caches."""
    if VECTOR > 1:
        o_c = i_t * VECTOR + tl.arange(0, VECTOR)
        mask = (i_t >= 0) & (row.prologue + o_c != t.y)
        e = exp(load_logits(row.p_body + o_c, mask) - finite(s.row_max))
        return Softmax(s.row_max, s.others + tl.sum(e, 0), s.smooth_sum, s.weight_sum)
    else:
        return s


@triton.jit
def update_edges(s, row, weight, o_c, mask, t, SMOOTH: tl.constexpr):
    """The sums with prologue and tail, but for the larger target."""
    b_z = load_logits(row.p_row + o_c, mask)
    row_max = tl.maximum(s.row_max, tl.max(b_z, 0))
    shift = finite(row_max)
    below = b_z - shift
    e = tl.where(o_c == t.y, 0.0, exp(below))
    others = s.others * exp(s.row_max - shift) + tl.sum(e, 0)
    smooth_sum = s.smooth_sum
    if SMOOTH:
        b_w = load_class_weights(weight, o_c, mask)
        smooth_sum = _raised(s, row_max) - tl.sum(tl.where(mask, b_w * below, 0.0), 0)
    return Softmax(row_max, others, smooth_sum, s.weight_sum)
