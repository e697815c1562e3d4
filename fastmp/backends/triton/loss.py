"""Cross-entropy of a mixed pair of targets with label smoothing, forward and backward.

For a row of logits z with targets a and b, mixing weight λ, smoothing ε, class weights w, and
m = max z, e = exp(z - m), total = Σ e, W = Σ w::

    loss = Σ_{y in a, b}  share_y · ( (1-ε) w_y (log total - (z_y - m))
                                      + ε/C (W log total + Σ_c w_c (m - z_c)) )
    grad = e · A / total - B w_c - D_a [c = a] - D_b [c = b]

    share_a = λ / divisor_a,   share_b = (1-λ) / divisor_b
    D_y = incoming · share_y (1-ε) w_y,   B = incoming (share_a + share_b) ε/C
    A   = D_a + D_b + B W

divisor_y is the sum of w_y over the rows that count, for the mean; 1 otherwise.

Bytes, 16-bit logits: 2 read and 2 written for each logit, and about 40 for each row. A row of up to
16,384 classes stays in registers between its two uses. A longer one comes in blocks of 8 KB, three
in flight, and comes again, backwards: what was read last is still in the caches. The first rows to
be taken are the last ones, which the matrix product before has just written.

Tiles (tiles.py): 32 logits a thread. Its four 16-byte loads are in flight before the first is used;
with 24 warps on a multiprocessor that is 48 KB, more than its share of the bandwidth needs
(4.8 TB/s · 0.8 us / 132 = 29 KB). A warp alone holds 1,024 logits, so rows of up to 1,024 meet no
barrier but one; shorter rows share warps. A program takes rows in turn, so that what the mean
divides by is added up once for all of them. A logit takes about 15 instructions: at 27 this kernel
would be bound by them and not by memory (132 · 128 lanes · 1.75 GHz against 4.3 TB/s / 4 bytes).

A row that starts at an odd address has up to seven logits before the first 16-byte boundary and
after the last: these edges are small loads of their own, so that everything between is loaded and
stored 16 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.triton import num_sms
from fastmp.backends.triton.kernels.numerics import exp
from fastmp.backends.triton.loss_row import (
    absorb,
    absorb_part,
    edges,
    gradient,
    gradient_part,
    is_needed,
    read_class_weights,
    read_incoming,
    read_logits,
    read_pair,
    span,
    store_at_target,
    term,
)
from fastmp.backends.triton.tiles import loss_tile

_NONE, _MEAN = 0, 1
# The divisor of the mean is added up in so many parts, by as many programs.
_PARTS = 64


@triton.jit
def _divisor_kernel(target_a, target_b, weight, parts, rows, classes, ignore_index,
                    PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """parts[t, part] = Σ w_y over the rows of this part that count for target t."""
    target = target_a
    if target_b is not None:
        target = target_a if tl.program_id(1) == 0 else target_b
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK, rows, PARTS * BLOCK):
        row = start + tl.arange(0, BLOCK)
        y = tl.load(target + row, mask=row < rows, other=ignore_index)
        counts = y != ignore_index
        if weight is not None:
            valid = counts & (y >= 0) & (y < classes)
            sums += tl.load(weight + y, mask=valid, other=0.0).to(tl.float32)
        else:
            sums += counts.to(tl.float32)
    tl.store(parts + tl.program_id(1) * PARTS + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def _divisors(parts, PAIR: tl.constexpr, PARTS: tl.constexpr):
    """What the shares of the two targets are divided by."""
    first = 1.0
    second = 1.0
    if parts is not None:
        first = tl.sum(tl.load(parts + tl.arange(0, PARTS)), 0)
        if PAIR:
            second = tl.sum(tl.load(parts + PARTS + tl.arange(0, PARTS)), 0)
    return first, second


@triton.jit
def _loss_kernel(
    logits, row_stride, target_a, target_b, lam, lam_stride, weight, weight_sum, incoming,
    incoming_stride, expected, parts, loss, stats, grad, rows, classes, ignore_index, on, off,
    SMOOTH: tl.constexpr, CHECK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, EDGES: tl.constexpr, ON_CHIP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Forward if loss is given, with the gradient if grad is; otherwise backward, from stats."""
    PAIR: tl.constexpr = target_b is not None
    divisor_a, divisor_b = _divisors(parts, PAIR, PARTS)
    all_weights = 1.0 * classes if weight is None else tl.load(weight_sum)
    tiles = tl.cdiv(rows, ROWS)
    needed = tl.where(is_needed(incoming, expected, CHECK), tiles, 0)
    for tile in tl.range(tl.program_id(0), needed, tl.num_programs(0)):
        row = (tiles - 1 - tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = row < rows
        start, first, body = span(row, row_stride, classes, VECTOR, EDGES)
        base = logits + start
        place = logits + first[:, None]
        head = (first - start).to(tl.int32)
        lane = tl.arange(0, BLOCK)[None, :]
        blocks = tl.cdiv(classes, BLOCK)
        if ON_CHIP:
            inside = there[:, None] & (lane < body[:, None])
            x = read_logits(place + lane, inside)
            w = read_class_weights(weight, head[:, None] + lane, inside)
        y_a, w_a, counts_a, share_a, y_b, w_b, counts_b, share_b = read_pair(
            target_a, target_b, lam, lam_stride, weight, divisor_a, divisor_b, row, there, classes,
            ignore_index)  # fmt: skip
        z_a = tl.load(base + y_a, mask=counts_a, other=0.0).to(tl.float32)
        if PAIR:
            z_b = tl.load(base + y_b, mask=counts_b, other=0.0).to(tl.float32)

        if loss is not None:
            largest = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            spread = tl.zeros((ROWS,), tl.float32)
            seen = tl.zeros((ROWS,), tl.float32)
            if ON_CHIP:
                largest, total, spread, seen, e = absorb(
                    largest, total, spread, seen, x, w, inside, SMOOTH)  # fmt: skip
                e_top = largest
            else:
                for block in tl.range(0, blocks, num_stages=3):
                    column = block * BLOCK + lane
                    largest, total, spread, seen = absorb_part(
                        largest, total, spread, seen, place + column, weight,
                        head[:, None] + column, column < body[:, None], SMOOTH)  # fmt: skip
            if EDGES:
                edge, on_edge = edges(head, body, classes, VECTOR)
                largest, total, spread, seen = absorb_part(
                    largest, total, spread, seen, base[:, None] + edge, weight, edge, on_edge,
                    SMOOTH)  # fmt: skip
            tl.store(stats + 2 * row, largest, mask=there)
            tl.store(stats + 2 * row + 1, total, mask=there)
            log_total = tl.log(total)
            smooth = off * (all_weights * log_total + spread) if SMOOTH else 0.0
            value = term(z_a, w_a, counts_a, share_a, largest, log_total, smooth, on)
            if PAIR:
                value += term(z_b, w_b, counts_b, share_b, largest, log_total, smooth, on)
            tl.store(loss + row, value, mask=there)
        else:
            largest = tl.load(stats + 2 * row, mask=there, other=0.0)
            total = tl.load(stats + 2 * row + 1, mask=there, other=1.0)
            if ON_CHIP:
                e = exp(x - largest[:, None])
                e_top = largest

        if grad is not None:
            came = read_incoming(incoming, incoming_stride, row, there)
            k_a = tl.where(counts_a, came * share_a, 0.0)
            k_b = tl.where(counts_b, came * share_b, 0.0)
            at_a = k_a * on * w_a
            at_b = k_b * on * w_b
            even = (k_a + k_b) * off
            scale = (at_a + at_b + even * all_weights) / total
            counts = counts_a | counts_b
            out_start, out_first, _ = span(row, classes, classes, VECTOR, EDGES)
            out = grad + out_start
            out_place = grad + out_first[:, None]
            if ON_CHIP:
                g = gradient(e, w, scale * exp(e_top - largest), even, counts, SMOOTH)
                tl.store(out_place + lane, g.to(grad.dtype.element_ty), mask=inside)
            else:
                for block in tl.range(0, blocks, num_stages=3):
                    column = (blocks - 1 - block) * BLOCK + lane
                    gradient_part(place + column, out_place + column, weight,
                                  head[:, None] + column, column < body[:, None], largest, scale,
                                  even, counts, SMOOTH)  # fmt: skip
            if EDGES:
                edge, on_edge = edges(head, body, classes, VECTOR)
                gradient_part(base[:, None] + edge, out[:, None] + edge, weight, edge, on_edge,
                              largest, scale, even, counts, SMOOTH)  # fmt: skip
            # The targets once more: to find them among all the others takes three instructions a
            # logit for each. The barrier puts one thread's store after another's to its place.
            tl.debug_barrier()
            store_at_target(out, y_a, z_a, w_a, at_a, y_b, at_b, largest, scale, even, counts_a)
            if PAIR:
                store_at_target(out, y_b, z_b, w_b, at_b, y_a, at_a, largest, scale, even,
                                counts_b)  # fmt: skip


def _vector(logits: Tensor) -> tuple[int, bool]:
    """How many logits an access can take, and whether rows have edges that it cannot.

    The gradient is dense, and has to have its 16-byte boundaries where the logits have theirs.
    """
    widest = 16 // logits.element_size()
    classes, stride = logits.shape[1], logits.stride(0)
    if logits.data_ptr() % 16:
        return 1, False
    if classes % widest == 0 and stride % widest == 0:
        return widest, False
    # Short rows share warps, and side by side fill every 32-byte sector anyway.
    if stride == classes and loss_tile(classes, logits.element_size()).rows == 1:
        return widest, True
    return 1, False


def _stride(values: Tensor | None) -> int:
    """From one row's value to the next one's: 0 for one value for all."""
    return values.stride(0) if values is not None and values.dim() else 0


def _launch(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    incoming: Tensor | None,
    stats: Tensor,
    grad: Tensor | None,
    *,
    loss: Tensor | None = None,
    expected: Tensor | None = None,
    check: bool = False,
) -> None:
    rows, classes = logits.shape
    if logits.stride(1) != 1 and classes > 1:
        logits = logits.contiguous()
    target = target.contiguous()
    target_b = None if target_b is None else target_b.contiguous()
    weight = None if weight is None else weight.contiguous()
    parts = None
    if reduction == _MEAN:
        pair = 1 if target_b is None else 2
        parts = logits.new_empty((pair, _PARTS), dtype=torch.float32)
        _divisor_kernel[(_PARTS, pair)](
            target, target_b, weight, parts, rows, classes, ignore_index,
            PARTS=_PARTS, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    tile = loss_tile(classes, logits.element_size())
    vector, has_edges = _vector(logits)
    programs = min(triton.cdiv(rows, tile.rows), tile.programs * num_sms(logits.device))
    _loss_kernel[(programs,)](
        logits, logits.stride(0), target, target_b, lam, _stride(lam), weight,
        None if weight is None else weight.sum(dtype=torch.float32), incoming,
        _stride(incoming), expected, parts, loss, stats, grad, rows,
        classes, ignore_index, 1.0 - smoothing, smoothing / classes, SMOOTH=smoothing > 0,
        CHECK=check, ROWS=tile.rows, BLOCK=tile.block, VECTOR=vector, EDGES=has_edges,
        ON_CHIP=tile.on_chip, PARTS=_PARTS, num_warps=tile.warps,
    )  # fmt: skip


def forward(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    grad_scale: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward``; arguments as ``fastmp.ops.loss.forward_reference``, not empty.

    A target out of range makes the loss of its row and the row's gradient NaN.
    """
    rows, classes = logits.shape
    each = logits.new_empty(rows, dtype=torch.float32)
    stats = logits.new_empty((rows, 2), dtype=torch.float32)
    grad = logits.new_empty((rows, classes) if with_grad else 0)
    _launch(
        logits, target, target_b, lam, weight, ignore_index, reduction, smoothing, grad_scale,
        stats, grad if with_grad else None, loss=each,
    )  # fmt: skip
    # torch adds up in a fixed order too, at half the host time of another kernel of ours.
    return each if reduction == _NONE else each.sum(), stats, grad


def backward(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> Tensor:
    """``fastmp::loss_backward``; arguments as ``fastmp.ops.loss.backward_reference``, not empty."""
    grad = logits.new_empty(logits.shape)
    _launch(
        logits, target, target_b, lam, weight, ignore_index, reduction, smoothing, grad_output,
        stats, grad,
    )  # fmt: skip
    return grad


def settle(
    grad: Tensor,
    expected: Tensor | None,
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> None:
    """``fastmp::loss_settle_``; arguments as ``fastmp.ops.loss.settle_reference``, not empty.

    The device compares: a few microseconds where the gradient is right, and no wait for the host.
    """
    _launch(
        logits, target, target_b, lam, weight, ignore_index, reduction, smoothing, grad_output,
        stats, grad, expected=expected, check=True,
    )  # fmt: skip
