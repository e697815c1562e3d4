"""The activations of a linear layer, their derivatives, and the gradients of activation and bias.

::

    relu       max(z, 0)
    gelu       z Φ(z), Φ the normal distribution
    gelu_tanh  z σ(2 √(2/π) (z + 0.044715 z³)), which is its tanh form
    silu       z σ(z)

    dz = dy · act'(z)       db = Σ_rows dz

The formulas and coefficients are those of ``csrc/cpu/activation.h``: one exponential each, shared
between value and derivative. NaN stays NaN; derivatives at ±inf are their limits, 0 and 1.

Bytes of the gradients, 16-bit: 4 read and 2 written for each element, 2 read with activation none,
2 more written where act(z) was not kept and is computed again from the same z;
and for each column of a split, a range of rows, 4 written and read again, which is 1/24 of that for
the shortest split, 32 rows, and 1/300 for one of 400.

Tiles: 128 columns are 256 bytes of a row, whole cache lines, and 32 rows of them are 32 elements a
thread. That is 8 loads of 16 bytes in flight, 16 KB a program and 64 KB on a multiprocessor, twice
what its share of the bandwidth needs (4.8 TB/s · 0.8 us / 132 = 29 KB). Every thread adds up its
own columns of a whole split; the threads' sums are added once, at its end. The sums of the splits
are then added in a fixed order by a second kernel: no atomics, two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.abi import ACTIVATION_CODES, Activation
from fastmp.backends.triton import num_sms
from fastmp.backends.triton.kernels.numerics import exp
from fastmp.backends.triton.tiles import SUM_SPLITS_TILE, activation_tile

# The only globals that the kernels read.
_NONE = tl.constexpr(int(Activation.NONE))
_RELU = tl.constexpr(int(Activation.RELU))
_GELU = tl.constexpr(int(Activation.GELU))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
_TANH_SCALE = tl.constexpr(1.59576912)  # 2 √(2/π)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _clamp(z, LIMIT: tl.constexpr):
    """z, limited to ±LIMIT; NaN stays NaN."""
    return tl.clamp(z, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reciprocal(v):
    """1 / v for v from 1 to 1e18, in 4 instructions; a division covers all v and takes 9."""
    root = tl.rsqrt(v)
    r = root * root
    return r * (2.0 - v * r)


@triton.jit
def _normal(z):
    """exp(-z²/2) and Φ(z), for |z| up to 1e18.

    Φ(-|z|) = exp(-z²/2) q(u), u = 1 / (1 + 0.3 |z|), q a polynomial fitted to 1.3e-7 relative.
    """
    u = _reciprocal(tl.abs(z) * 0.3 + 1.0)
    q = u * 0.0359315723 - 0.158275366
    q = q * u + 0.208205581
    q = q * u - 0.0553929657
    q = q * u + 0.129468754
    q = q * u + 0.0996376202
    q = q * u + 0.120798342
    q = q * u + 0.119626388
    density = tl.exp2(z * z * -0.7213475204444817)  # log2(e) / 2
    tail = density * (q * u)
    return density, tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def _sigmoid(x):
    """σ(x) and its complement, from one exponential of -|x|: both keep their relative precision."""
    e = exp(-tl.abs(x))
    near_one = _reciprocal(1.0 + e)
    near_zero = e * near_one
    return tl.where(x < 0, near_zero, near_one), tl.where(x < 0, near_one, near_zero)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z), fp32."""
    if ACTIVATION == _NONE:
        return z
    elif ACTIVATION == _RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == _GELU:
        _, distribution = _normal(_clamp(z, 15.0))  # beyond it is 0 or 1
        return z * distribution
    elif ACTIVATION == _GELU_TANH:
        sigma, _ = _sigmoid(z * _TANH_SCALE * (z * z * _TANH_CUBIC + 1.0))
        return z * sigma
    else:
        sigma, _ = _sigmoid(z)
        return z * sigma


@triton.jit
def gradient(grad, saved, ACTIVATION: tl.constexpr):
    """grad · act'(z), fp32; saved is z, or y for relu."""
    if ACTIVATION == _RELU:
        return tl.where(saved <= 0, 0.0, grad)
    elif ACTIVATION == _GELU:
        z = _clamp(saved, 15.0)
        density, distribution = _normal(z)
        return grad * (distribution + z * 0.398942280 * density)
    elif ACTIVATION == _GELU_TANH:
        z = _clamp(saved, 15.0)
        sigma, complement = _sigmoid(z * _TANH_SCALE * (z * z * _TANH_CUBIC + 1.0))
        slope = z * z * (3.0 * _TANH_CUBIC * _TANH_SCALE) + _TANH_SCALE
        return grad * (sigma + z * slope * sigma * complement)
    else:
        z = _clamp(saved, 110.0)
        sigma, complement = _sigmoid(z)
        return grad * sigma * (z * complement + 1.0)


@triton.jit
def _activation_backward_kernel(
    grad,  # (M, N)
    saved,  # (M, N); not read for none
    dz,  # (M, N); not written for none
    y,  # (M, N), act(saved), or None; not written for none
    db_partial,  # (splits, N), fp32, or None
    M, N, split_m, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """dz and y, and in db_partial the sums of dz over the split_m rows of each program."""
    N = N // VECTOR * VECTOR  # a multiple of VECTOR: the compiler then takes 16 bytes at a time
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_tile = o_m * N + o_n
    first_m = tl.program_id(1).to(tl.int64) * split_m
    rows = tl.minimum(M - first_m, split_m).to(tl.int32)
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in range(0, rows, BLOCK_M):
        mask = (start_m + o_m < rows) & (o_n < N)
        o_row = (first_m + start_m) * N
        b_dz = tl.load(grad + o_row + o_tile, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != _NONE:
            b_saved = tl.load(saved + o_row + o_tile, mask=mask, other=0.0).to(tl.float32)
            b_dz = gradient(b_dz, b_saved, ACTIVATION)
            tl.store(dz + o_row + o_tile, b_dz.to(dz.dtype.element_ty), mask=mask)
            if y is not None:
                b_y = activate(b_saved, ACTIVATION)
                tl.store(y + o_row + o_tile, b_y.to(y.dtype.element_ty), mask=mask)
        if db_partial is not None:
            b_sum += b_dz
    if db_partial is not None:
        o_partial = tl.program_id(1).to(tl.int64) * N + o_n
        tl.store(db_partial + o_partial, tl.sum(b_sum, 0)[None, :], mask=o_n < N)


@triton.jit
def _sum_splits_kernel(
    db_partial,  # (splits, N), fp32
    db,  # (N)
    splits, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db = Σ_splits db_partial, rounded once."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    o_m = tl.arange(0, BLOCK_M)[:, None]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_m in range(0, splits, BLOCK_M):
        mask = (start_m + o_m < splits) & (o_n < N)
        o_partial = (start_m + o_m).to(tl.int64) * N + o_n
        b_sum += tl.load(db_partial + o_partial, mask=mask, other=0.0)
    b_db = tl.sum(b_sum, 0)[None, :]
    tl.store(db + o_n, b_db.to(db.dtype.element_ty), mask=o_n < N)


def activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dz and db, the latter empty unless needed, in one pass over matrices of rows.

    Args:
        grad: dy, (M, N), fp32, fp16 or bf16.
        saved: z, or y for relu, of the same shape; not read for none, whose dz is grad itself.
        activation: a key of ``ACTIVATION_CODES``.
        needs_bias: whether to compute db.
        y: dense, to be filled with act(saved), or None; left as it is for none.
    """
    m, n = grad.shape
    db = grad.new_empty(n if needs_bias else 0)
    if grad.numel() == 0:
        return torch.empty_like(grad), db.zero_()
    if activation == "none" and not needs_bias:
        return grad, db
    dense, saved = grad.contiguous(), saved.contiguous()
    dz = grad if activation == "none" else torch.empty_like(dense)
    widest = 16 // grad.element_size()
    vector = 1 if n % widest else widest
    tile = activation_tile(m, n, vector, num_sms(grad.device))
    splits = triton.cdiv(m, tile.split_m)
    partial = None
    if needs_bias:
        partial = torch.empty(splits, n, dtype=torch.float32, device=grad.device)
    _activation_backward_kernel[(triton.cdiv(n, tile.block_n), splits)](
        dense, saved, dz, y, partial, m, n, tile.split_m, ACTIVATION=ACTIVATION_CODES[activation],
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, VECTOR=vector, num_warps=tile.warps,
    )  # fmt: skip
    if needs_bias:
        block_m, block_n, warps = SUM_SPLITS_TILE
        _sum_splits_kernel[(triton.cdiv(n, block_n),)](
            partial, db, splits, n, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip
    return dz, db
