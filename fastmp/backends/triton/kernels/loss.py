"""Cross-entropy of a mixed pair of targets with label smoothing, forward and backward.

For a row of logits z with targets a and b, mixing weight λ, smoothing ε, class weights w, and
row_max = max z, e = exp(z - row_max), sum_exp = Σ e, smooth_sum = Σ_c w_c (row_max - z_c)::

    loss   = Σ_{y in a, b}  mix_weight_y · ( (1-ε) w_y (log sum_exp - (z_y - row_max))
                                             + ε/C (Σw log sum_exp + smooth_sum) )
    grad_c = softmax_coef e_c / sum_exp - smooth_coef w_c
             - target_coef_a [c = a] - target_coef_b [c = b]

    mix_weight_a  = λ / divisor_a,   mix_weight_b = (1-λ) / divisor_b
    target_coef_y = grad_output · mix_weight_y (1-ε) w_y
    smooth_coef   = grad_output (mix_weight_a + mix_weight_b) ε/C
    softmax_coef  = target_coef_a + target_coef_b + smooth_coef Σw

divisor_y is the sum of w_y over the rows that are not ignored, for the mean; 1 otherwise.

The larger t of the two targets is left out of the sum: others = Σ_{c != t} e_c. Near softmax 1
nothing then cancels (docs/numerics.md)::

    sum_exp = others + e_t,   log sum_exp = log(1 + others) where e_t = 1
    grad_t  = ((target_coef_other + smooth_coef (Σw - w_t)) e_t
               - (target_coef_t + smooth_coef w_t) others) / sum_exp

Bytes, 16-bit logits: 2 read and 2 written for each logit, and about 40 for each row. A row of up to
16,384 classes stays in registers between its two uses. A longer one comes in blocks of 2,048, three
in flight, and comes again, backwards: the blocks read last are still in the caches. A thread keeps
a maximum and a sum for each 16-byte vector of its own, and threads meet once a row. The last rows
are taken first: the matrix product before has just written them.

Tiles (tiles.py): 32 logits a thread. Its four 16-byte loads are in flight before the first is used;
with 24 warps on a multiprocessor that is 48 KB, more than its share of the bandwidth needs
(4.8 TB/s · 0.8 us / 132 = 29 KB). A warp alone holds 1,024 logits, so rows of up to 1,024 meet no
barrier but one; shorter rows share warps. A program takes one tile of rows after another, so that
it adds up the divisors of the mean once. A logit takes about 15 instructions: at 27 this kernel
would be bound by them and not by memory (132 · 128 lanes · 1.75 GHz against 4.3 TB/s / 4 bytes).

A row that starts at an odd address has up to seven logits before the first 16-byte boundary
(prologue) and after the last (tail): these are small loads of their own, so that the vector body
between them is loaded and stored 16 bytes at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.triton import num_sms
from fastmp.backends.triton.kernels.loss_row import (
    Softmax,
    add_rest,
    exp_block,
    load_block,
    load_grad_output,
    load_targets,
    locate,
    log_sum_exp,
    peeled,
    softmax_of_block,
    store_gradient,
    sums_of_rows,
    target_loss,
    update_edges,
    update_vectors,
    vector_of,
)
from fastmp.backends.triton.tiles import loss_tile

# Each divisor of the mean is the sum of so many partials, each by one program.
_PARTIALS = 64


@triton.jit
def _divisor_kernel(
    target_a,  # (N)
    target_b,  # (N), None: one target
    weight,  # (C), None: all 1
    partial,  # (1 or 2 targets, PARTIALS)
    N, C, ignore_index, PARTIALS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[t, i] = Σ w_y of target t, over program i's rows that are not ignored."""
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
def _divisors(partial, PAIR: tl.constexpr, PARTIALS: tl.constexpr):
    """divisor_a and divisor_b."""
    divisor_a = 1.0
    divisor_b = 1.0
    if partial is not None:
        divisor_a = tl.sum(tl.load(partial + tl.arange(0, PARTIALS)), 0)
        if PAIR:
            divisor_b = tl.sum(tl.load(partial + PARTIALS + tl.arange(0, PARTIALS)), 0)
    return divisor_a, divisor_b


@triton.jit
def _forward_kernel(
    logits, stride_logits,  # (N, C)
    target_a,  # (N)
    target_b,  # (N), None: one target
    lam, stride_lam,  # (N), or () with stride 0
    weight,  # (C), None: all 1
    weight_total,  # (): Σw, None without weight
    grad_output, stride_grad_output,  # (), None: 1
    partial,  # (1 or 2 targets, PARTIALS), None: divisors are 1
    loss,  # (N)
    stats,  # (N, 2): row_max, others
    grad,  # (N, C), None: the loss alone; may be the logits
    N, C, ignore_index, target_prob, smooth_prob, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr, ON_CHIP: tl.constexpr,
    WHOLE: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of each row; with grad also the gradient, for this grad_output."""
    PAIR: tl.constexpr = target_b is not None
    WEIGHTED: tl.constexpr = weight is not None
    divisor_a, divisor_b = _divisors(partial, PAIR, PARTIALS)
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    tiles = tl.cdiv(N, BLOCK_N)
    for i_n in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        o_n = (tiles - 1 - i_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        rows = locate(logits, stride_logits, o_n, m_n, C, VECTOR, PEEL)
        block = load_block(rows, weight, 0, BLOCK_C, WHOLE) if ON_CHIP else None
        t, other = load_targets(target_a, target_b, lam, stride_lam, weight, divisor_a, divisor_b,
                                rows, C, ignore_index)  # fmt: skip
        block_max = None
        if ON_CHIP:
            s, block = softmax_of_block(block, t, rows, VECTOR, SMOOTH, WEIGHTED, WHOLE)
            block_max = s.row_max
        else:
            lowest = tl.full((BLOCK_N, BLOCK_C // VECTOR), float("-inf"), tl.float32)
            zeros = tl.zeros((BLOCK_N, BLOCK_C // VECTOR), tl.float32)
            i_t = vector_of(t, rows, VECTOR)
            vectors = Softmax(lowest, zeros, zeros, zeros)
            for i_c in tl.range(0, tl.cdiv(C, BLOCK_C), num_stages=3):
                loaded = load_block(rows, weight, i_c, BLOCK_C, WHOLE)
                vectors = update_vectors(vectors, loaded, i_c, i_t, rows, VECTOR, SMOOTH, WEIGHTED,
                                         WHOLE)  # fmt: skip
            s = add_rest(sums_of_rows(vectors), t, i_t, rows, VECTOR)
        if PEEL:
            o_c, mask = peeled(rows, C, VECTOR)
            s = update_edges(s, rows, weight, o_c, mask, t, SMOOTH)
        tl.store(stats + 2 * o_n, s.row_max, mask=m_n)
        tl.store(stats + 2 * o_n + 1, s.others, mask=m_n)
        lse = log_sum_exp(t, s.row_max, s.others)
        smooth_loss = smooth_prob * (weight_total * lse + s.smooth_sum) if SMOOTH else 0.0
        row_loss = target_loss(t, s.row_max, lse, smooth_loss, target_prob)
        if PAIR:
            row_loss += target_loss(other, s.row_max, lse, smooth_loss, target_prob)
        tl.store(loss + o_n, row_loss, mask=m_n)
        if grad is not None:
            g = load_grad_output(grad_output, stride_grad_output, rows)
            store_gradient(grad, rows, block, block_max, weight, weight_total, t, other, g,
                           s.row_max, s.others, C, target_prob, smooth_prob, PAIR, SMOOTH, BLOCK_C,
                           VECTOR, PEEL, WHOLE)  # fmt: skip


@triton.jit
def _backward_kernel(
    logits, stride_logits,  # (N, C)
    target_a,  # (N)
    target_b,  # (N), None: one target
    lam, stride_lam,  # (N), or () with stride 0
    weight,  # (C), None: all 1
    weight_total,  # (): Σw, None without weight
    grad_output, stride_grad_output,  # (N), or () with stride 0
    assumed_grad_output,  # (), None: 1
    partial,  # (1 or 2 targets, PARTIALS), None: divisors are 1
    stats,  # (N, 2): row_max, others
    grad,  # (N, C)
    N, C, ignore_index, target_prob, smooth_prob, SMOOTH: tl.constexpr, CHECK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr,
    ON_CHIP: tl.constexpr, WHOLE: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The gradient, from stats; with CHECK only if grad_output is not the assumed one."""
    PAIR: tl.constexpr = target_b is not None
    divisor_a, divisor_b = _divisors(partial, PAIR, PARTIALS)
    weight_total = 1.0 * C if weight is None else tl.load(weight_total)
    tiles = tl.cdiv(N, BLOCK_N)
    wanted = tiles
    if CHECK:
        assumed = 1.0 if assumed_grad_output is None else tl.load(assumed_grad_output)
        wanted = tl.where(tl.load(grad_output) != assumed, tiles, 0)
    for i_n in tl.range(tl.program_id(0), wanted, tl.num_programs(0)):
        o_n = (tiles - 1 - i_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        rows = locate(logits, stride_logits, o_n, m_n, C, VECTOR, PEEL)
        block = load_block(rows, weight, 0, BLOCK_C, WHOLE) if ON_CHIP else None
        t, other = load_targets(target_a, target_b, lam, stride_lam, weight, divisor_a, divisor_b,
                                rows, C, ignore_index)  # fmt: skip
        row_max = tl.load(stats + 2 * o_n, mask=m_n, other=0.0)
        others = tl.load(stats + 2 * o_n + 1, mask=m_n, other=1.0)
        if ON_CHIP:
            block = exp_block(block, row_max)
        g = load_grad_output(grad_output, stride_grad_output, rows)
        store_gradient(grad, rows, block, row_max, weight, weight_total, t, other, g, row_max,
                       others, C, target_prob, smooth_prob, PAIR, SMOOTH, BLOCK_C, VECTOR, PEEL,
                       WHOLE)  # fmt: skip


def _vector(logits: Tensor) -> tuple[int, bool]:
    """Logits in an access, and whether rows have a prologue and a tail.

    The gradient is dense and must have its 16-byte boundaries where the logits have theirs.
    """
    widest = 16 // logits.element_size()
    classes, stride = logits.shape[1], logits.stride(0)
    if logits.data_ptr() % 16:
        return 1, False
    if classes % widest == 0 and stride % widest == 0:
        return widest, False
    # Short rows share warps, and side by side fill every 32-byte sector anyway.
    if stride == classes and loss_tile(classes).rows == 1:
        return widest, True
    return 1, False


def _stride(values: Tensor | None) -> int:
    """From one row's value to the next one's: 0 for one value for all."""
    return values.stride(0) if values is not None and values.dim() else 0


def _launch(
    kernel: Any,
    logits: Tensor,
    spec: LossSpec,
    grad_output: tuple[Any, ...],
    outputs: tuple[Tensor | None, ...],
    **constants: bool,
) -> None:
    """Launch one of the two kernels; grad_output and outputs: its arguments around partial."""
    n, c = logits.shape
    if logits.stride(1) != 1 and c > 1:
        logits = logits.contiguous()
    target_a = spec.target_a.contiguous()
    target_b = None if spec.target_b is None else spec.target_b.contiguous()
    weight = None if spec.weight is None else spec.weight.contiguous()
    partial = None
    if spec.reduction == Reduction.MEAN:
        targets = 1 if target_b is None else 2
        partial = logits.new_empty((targets, _PARTIALS), dtype=torch.float32)
        _divisor_kernel[(_PARTIALS, targets)](
            target_a, target_b, weight, partial, n, c, spec.ignore_index,
            PARTIALS=_PARTIALS, BLOCK_N=1024, num_warps=4,
        )  # fmt: skip
    tile = loss_tile(c)
    vector, peel = _vector(logits)
    programs = min(triton.cdiv(n, tile.rows), tile.programs * num_sms(logits.device))
    kernel[(programs,)](
        logits, logits.stride(0), target_a, target_b, spec.lam, _stride(spec.lam), weight,
        None if weight is None else weight.sum(dtype=torch.float32), *grad_output, partial,
        *outputs, n, c, spec.ignore_index, 1.0 - spec.smoothing, spec.smoothing / c,
        SMOOTH=spec.smoothing > 0, BLOCK_N=tile.rows, BLOCK_C=tile.block, VECTOR=vector, PEEL=peel,
        ON_CHIP=tile.on_chip, WHOLE=not peel and tile.rows == 1 and c % tile.block == 0,
        PARTIALS=_PARTIALS, num_warps=tile.warps, maxnreg=tile.max_registers, **constants,
    )  # fmt: skip


def forward(
    logits: Tensor, assumed_grad_output: Tensor | None, compute_grad: bool, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmp::loss_forward`` of logits that are not empty.

    A target out of range makes the loss of its row and the row's gradient NaN.
    """
    grad = logits.new_empty(logits.shape if compute_grad else 0)
    written = grad if compute_grad else None
    return *_forward(logits, assumed_grad_output, spec, written), grad


def forward_in_place(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """``fastmp::loss_forward_`` of dense logits that are not empty."""
    return _forward(logits, assumed_grad_output, spec, logits)


def _forward(
    logits: Tensor, assumed_grad_output: Tensor | None, spec: LossSpec, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = len(logits)
    loss = logits.new_empty(n, dtype=torch.float32)
    stats = logits.new_empty((n, 2), dtype=torch.float32)
    _launch(_forward_kernel, logits, spec, (assumed_grad_output, 0), (loss, stats, grad))
    # torch adds up in a fixed order too, at half the host time of another kernel of ours.
    return loss if spec.reduction == Reduction.NONE else loss.sum(), stats


def backward(grad_output: Tensor, logits: Tensor, stats: Tensor, spec: LossSpec) -> Tensor:
    """``fastmp::loss_backward`` of logits that are not empty."""
    grad = logits.new_empty(logits.shape)
    given = grad_output, _stride(grad_output), None
    _launch(_backward_kernel, logits, spec, given, (stats, grad), CHECK=False)
    return grad


def ensure_grad(
    grad: Tensor,
    assumed_grad_output: Tensor | None,
    grad_output: Tensor,
    logits: Tensor,
    stats: Tensor,
    spec: LossSpec,
) -> None:
    """``fastmp::loss_ensure_grad_`` of logits that are not empty.

    The device compares: a few microseconds where the gradient is right, and no wait for the host.
    """
    given = grad_output, _stride(grad_output), assumed_grad_output
    _launch(_backward_kernel, logits, spec, given, (stats, grad), CHECK=True)
