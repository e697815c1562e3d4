"""What the loss does with a row, or with several: the parts of the kernel in ``loss.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.numerics import exp


@triton.jit
def read_target(target, weight, row, there, classes, ignore_index):
    """Index, weight and whether it counts. One out of range weighs NaN: loud, and no crash."""
    y = tl.load(target + row, mask=there, other=ignore_index)
    counts = y != ignore_index
    valid = counts & (y >= 0) & (y < classes)
    y = tl.where(valid, y, 0).to(tl.int32)
    w = tl.where(counts, 1.0, 0.0)
    if weight is not None:
        w = tl.load(weight + y, mask=valid, other=0.0).to(tl.float32)
    return y, tl.where(counts & ~valid, float("nan"), w), counts


@triton.jit
def read_pair(target_a, target_b, lam, lam_stride, weight, divisor_a, divisor_b, row, there,
              classes, ignore_index):  # fmt: skip
    """Index, weight, whether it counts, and share of both targets; without b its share is 0."""
    y_a, w_a, counts_a = read_target(target_a, weight, row, there, classes, ignore_index)
    if target_b is not None:
        y_b, w_b, counts_b = read_target(target_b, weight, row, there, classes, ignore_index)
        share = tl.load(lam + row * lam_stride, mask=there, other=0.0)
        share_a = share / divisor_a
        share_b = (1.0 - share) / divisor_b
    else:
        y_b, w_b, counts_b = y_a, w_a, counts_a
        share_a = tl.zeros_like(w_a) + 1.0 / divisor_a
        share_b = tl.zeros_like(w_a)
    return y_a, w_a, counts_a, share_a, y_b, w_b, counts_b, share_b


@triton.jit
def is_needed(incoming, expected, CHECK: tl.constexpr):
    """False if the gradient is there already, written for the incoming gradient that has come."""
    if CHECK:
        foretold = 1.0
        if expected is not None:
            foretold = tl.load(expected)
        return tl.load(incoming) != foretold
    else:
        return True


@triton.jit
def read_incoming(incoming, incoming_stride, row, there):
    """The incoming gradient of each row; without one it is 1."""
    if incoming is not None:
        return tl.load(incoming + row * incoming_stride, mask=there, other=0.0)
    else:
        return tl.where(there, 1.0, 0.0)


@triton.jit
def span(row, stride, classes, VECTOR: tl.constexpr, EDGES: tl.constexpr):
    """Where the logits of a row start, its first 16-byte boundary, and how far its last is away.

    Said in multiples of VECTOR, so that the compiler knows: without edges all three are.
    """
    if EDGES:
        start = row * stride
        first = tl.cdiv(start, VECTOR) * VECTOR
        return start, first, (start + classes - first).to(tl.int32) // VECTOR * VECTOR
    else:
        start = row * (stride // VECTOR * VECTOR)
        return start, start, tl.zeros_like(row).to(tl.int32) + classes // VECTOR * VECTOR


@triton.jit
def edges(head, body, classes, VECTOR: tl.constexpr):
    """Columns of the logits before and after the body, and which of them there are."""
    lane = tl.arange(0, 2 * VECTOR)[None, :]
    column = tl.where(lane < VECTOR, lane, (head + body)[:, None] + lane - VECTOR)
    return column, column < tl.where(lane < VECTOR, head[:, None], classes)


@triton.jit
def read_logits(place, inside):
    """In fp32; outside they are nothing to a maximum or a sum of exponentials."""
    return tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def read_class_weights(weight, column, inside):
    """w of these columns; 1 for all without class weights."""
    if weight is not None:
        return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return 1.0


@triton.jit
def absorb(largest, total, spread, seen, x, w, inside, SMOOTH: tl.constexpr):
    """max x, Σ exp(x - max), Σ w (max - x) and Σ w of each row, with those of what came before.

    Every term is positive: nothing cancels, whatever the logits.
    """
    top = tl.maximum(largest, tl.max(x, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    below = x - shift[:, None]
    e = exp(below)
    total = total * exp(largest - shift) + tl.sum(e, 1)
    if SMOOTH:
        spread += tl.where(seen > 0, seen * (top - largest), 0.0)
        spread -= tl.sum(tl.where(inside, w * below, 0.0), 1)
        seen += tl.sum(tl.where(inside, w, 0.0), 1)
    return top, total, spread, seen, e


@triton.jit
def absorb_part(largest, total, spread, seen, place, weight, column, inside,
                SMOOTH: tl.constexpr):  # fmt: skip
    """Reads a part of a row for absorb."""
    x = read_logits(place, inside)
    w = read_class_weights(weight, column, inside)
    top, total, spread, seen, _ = absorb(largest, total, spread, seen, x, w, inside, SMOOTH)
    return top, total, spread, seen


@triton.jit
def term(z, w, counts, share, largest, log_total, smooth, on):
    """The first formula for one target; smooth is its second line."""
    return share * tl.where(counts, on * w * (log_total - (z - largest)) + smooth, 0.0)


@triton.jit
def gradient(e, w, scale, even, counts, SMOOTH: tl.constexpr):
    """The second formula but for the targets; scale is A / total. Ignored rows may hold NaN."""
    grad = e * scale[:, None]
    if SMOOTH:
        grad -= even[:, None] * w
    return tl.where(counts[:, None], grad, 0.0)


@triton.jit
def gradient_part(place, out, weight, column, inside, largest, scale, even, counts,
                  SMOOTH: tl.constexpr):  # fmt: skip
    """Reads a part of a row and writes its gradient."""
    e = exp(read_logits(place, inside) - largest[:, None])
    w = read_class_weights(weight, column, inside)
    grad = gradient(e, w, scale, even, counts, SMOOTH)
    tl.store(out, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_at_target(out, y, z, w, at, y_other, at_other, largest, scale, even, counts):
    """The gradient of one target's logit, in full."""
    at += tl.where(y == y_other, at_other, 0.0)
    grad = exp(z - largest) * scale - even * w - at
    tl.store(out + y, grad.to(out.dtype.element_ty), mask=counts)
