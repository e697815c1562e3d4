"""The products of a Newton-Schulz iteration, of matrices of all shapes in one launch.

::

    out = f (alpha a b + beta c + gamma d)

f, of each matrix in fp32, is 1 / ||X|| in the first product with X, and in the last one the scale.
Operands are bf16, sums fp32, a result is rounded once. A program has one tile of one matrix, which
a row of a table describes, in units of 8 elements, 16 bytes, of which all are multiples: offsets of
a, b and out, their strides, M, N, K, the tile's first row and column; and the matrix. Other sizes
are padded with zeros by the caller. A launch takes some us however small it is, and the matrices of
a ResNet-18 have 11 shapes: one launch for all of them is what makes its iteration short.

Of a symmetric result the tiles from the diagonal down are computed, and written a second time
transposed: for n x n in tiles of 128, 53% of the products at n = 2048, 58% at 768, 67% at 384.
Tiles on the diagonal are written as they are, symmetric to rounding. A symmetric b is read by rows
of K all the same: as its transpose, which is a's layout, it would turn the sign of that rounding
around, which then grows, the error of 48 x 16 matrices to 15% in three steps instead of 2%.

The first product, of X and itself, has the squared norm of X on its diagonal: each tile there
leaves its part of it, in fp32, and ``_normalize_kernel`` divides G by it, 4 bytes an element of G.
X is divided only when Q X is made: no pass over X for its norm and none to divide it. A norm whose
square is not finite makes f = 0, and the matrix gets no update.

Bytes of a tile's step of k: 2 (BLOCK_M + BLOCK_N) BLOCK_K, from L2: a matrix of 768 x 3072 is 4.7
MB. They are copied to shared memory in the background, 16 bytes a thread at a time. Two programs a
multiprocessor hide one's epilogue behind the other's product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmp.backends.triton.kernels.early import allow_next_launch, wait_for_previous_launch


@triton.jit
def _offset(p_tile, FIELD: tl.constexpr):
    return tl.load(p_tile + FIELD).to(tl.int64) * 8


@triton.jit
def _size(p_tile, FIELD: tl.constexpr):
    return tl.load(p_tile + FIELD) * 8


@triton.jit
def _operand(
    p_x, start, size, stride, K_FIRST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Pointer, offsets and step along K of the tiles of an operand, (K, size) or (size, K).

    Rows of the latter beyond its last one are the last one again: no mask, and no sum of them is
    stored.
    """
    o_x = tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    if K_FIRST:
        return p_x + start, o_k[:, None] * stride + o_x[None, :], BLOCK_K * stride
    else:
        o_row = tl.minimum(o_x, size - 1 - start)[:, None] * stride
        return p_x + start.to(tl.int64) * stride, o_row + o_k[None, :], BLOCK_K


@triton.jit
def _load(p_tile, m_x, m_k, K_FIRST: tl.constexpr):
    if K_FIRST:
        return tl.load(p_tile, mask=m_k[:, None] & m_x[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=m_k[None, :], other=0.0)


@triton.jit
def _add_columns(b_acc, p_term, stride, factor, m_m, N):
    o_m = tl.arange(0, b_acc.shape[0])
    o_n = tl.arange(0, b_acc.shape[1])
    mask = m_m[:, None] & (o_n < N)[None, :]
    b_term = tl.load(p_term + o_m[:, None] * stride + o_n[None, :], mask=mask, other=0.0)
    return b_acc + factor * b_term.to(tl.float32)


@triton.jit
def _add_term(b_acc, p_term, stride, factor, m_m, N):
    """In halves, each thread's own elements: all at once takes 40 registers more."""
    BLOCK_M: tl.constexpr = b_acc.shape[0]
    HALF: tl.constexpr = b_acc.shape[1] // 2
    b_pair = tl.permute(tl.reshape(b_acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
    b_left, b_right = tl.split(b_pair)
    b_left = _add_columns(b_left, p_term, stride, factor, m_m, N)
    b_right = _add_columns(b_right, p_term + HALF, stride, factor, m_m, N - HALF)
    b_pair = tl.permute(tl.join(b_left, b_right), (0, 2, 1))
    return tl.reshape(b_pair, (BLOCK_M, 2 * HALF))


@triton.jit
def _trace(b_acc, m_m):
    """Of a tile on the diagonal, within the matrix."""
    o_m = tl.arange(0, b_acc.shape[0])
    m_diagonal = (o_m[:, None] == o_m[None, :]) & m_m[:, None]
    return tl.sum(tl.where(m_diagonal, b_acc, 0.0))


@triton.jit
def _store(p_out, stride, b_out, m_m, m_n):
    o_m = tl.arange(0, b_out.shape[0])
    o_n = tl.arange(0, b_out.shape[1])
    p_tile = p_out + o_m[:, None] * stride + o_n[None, :]
    tl.store(p_tile, b_out, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _product_kernel(
    a, b, out,  # the matrices
    c, d,  # as out; c None: a is b, and parts of the norm are written to partials
    partials,  # (matrices, SLOTS)
    inverse_norms, scales,  # (matrices), factors of the result; 1 where they are not due
    tiles,  # (programs, FIELDS)
    alpha, beta, gamma, A_COLUMNS: tl.constexpr, B_ROWS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SLOTS: tl.constexpr, FIELDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A_COLUMNS: a is (K, M) in memory. B_ROWS: b is (N, K). d counts where gamma is not 0."""
    p_tile = tiles + tl.program_id(0) * FIELDS
    p_a = a + _offset(p_tile, 0)
    p_b = b + _offset(p_tile, 1)
    stride_a, stride_b, stride_out = _size(p_tile, 3), _size(p_tile, 4), _size(p_tile, 5)
    M, N, K = _size(p_tile, 6), _size(p_tile, 7), _size(p_tile, 8)
    start_m, start_n = _size(p_tile, 9), _size(p_tile, 10)
    i_matrix = tl.load(p_tile + 11)
    wait_for_previous_launch(EARLY)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < M - start_m
    m_n = o_n < N - start_n
    p_a, o_a, step_a = _operand(p_a, start_m, M, stride_a, A_COLUMNS, BLOCK_M, BLOCK_K)
    p_b, o_b, step_b = _operand(p_b, start_n, N, stride_b, not B_ROWS, BLOCK_N, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        m_k = o_k < K - i_k * BLOCK_K
        b_a = _load(p_a + o_a, m_m, m_k, A_COLUMNS)
        b_b = _load(p_b + o_b, m_n, m_k, not B_ROWS)
        if A_COLUMNS:
            b_a = b_a.T
        if B_ROWS:
            b_b = b_b.T
        b_acc = tl.dot(b_a, b_b, b_acc)
        p_a += step_a
        p_b += step_b
    allow_next_launch(EARLY)

    p_out = out + _offset(p_tile, 2)
    o_here = start_m.to(tl.int64) * stride_out + start_n
    if c is None:
        if start_m == start_n:
            p_part = partials + i_matrix * SLOTS + start_m // BLOCK_M
            tl.store(p_part, _trace(b_acc, m_m))
    else:
        o_c = _offset(p_tile, 2) + o_here
        b_acc = _add_term(b_acc * alpha, c + o_c, stride_out, beta, m_m, N - start_n)
        if gamma != 0.0:
            b_acc = _add_term(b_acc, d + o_c, stride_out, gamma, m_m, N - start_n)
    if not SYMMETRIC:
        factor = tl.load(inverse_norms + i_matrix) * tl.load(scales + i_matrix)
        b_acc = tl.where(factor == 0.0, 0.0, b_acc * factor)  # 0 inf is no NaN
    b_out = b_acc.to(out.dtype.element_ty)
    if SYMMETRIC and start_m != start_n:
        o_mirror = start_n.to(tl.int64) * stride_out + start_m
        _store(p_out + o_mirror, stride_out, b_out.T, m_n, m_m)
    _store(p_out + o_here, stride_out, b_out, m_m, m_n)


@triton.jit
def _normalize_kernel(
    gram,  # the matrices
    partials,  # (matrices, SLOTS)
    inverse_norms,  # (matrices), written
    blocks,  # (programs, 3): offset and length in units of UNIT elements, matrix
    eps, SLOTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """G <- G / max(||X||, eps)², and 1 / max(||X||, eps), by every program of a matrix."""
    p_block = blocks + tl.program_id(0) * 3
    i_matrix = tl.load(p_block + 2)
    wait_for_previous_launch(EARLY)
    allow_next_launch(EARLY)
    squares = tl.sum(tl.load(partials + i_matrix * SLOTS + tl.arange(0, SLOTS)), axis=0)
    factor = 1.0 / tl.maximum(tl.sqrt(squares), eps)
    tl.store(inverse_norms + i_matrix, factor)
    o_g = tl.arange(0, BLOCK)
    mask = o_g < _size(p_block, 1)
    p_g = gram + _offset(p_block, 0) + o_g
    b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32) * factor * factor
    b_g = tl.where(factor == 0.0, 0.0, b_g)
    tl.store(p_g, b_g.to(gram.dtype.element_ty), mask=mask)
