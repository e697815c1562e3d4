"""The activations of a linear layer, their derivatives, and the gradients of activation and bias.

::

    relu       max(z, 0)
    gelu       z Φ(z), Φ the normal distribution
    gelu_tanh  z σ(2 √(2/π) (z + 0.044715 z³)), which is its tanh form
    silu       z σ(z)

    dz = dy · act'(z)       db = Σ_rows dz

All three are z / (1 + 2^(z p(z²))), with p a constant for silu, of two terms for gelu_tanh, and for
gelu fitted to what 16 bits can show: one exponential and one reciprocal each, shared between value
and derivative. On sm_90 gelu takes 7 instructions of arithmetic an element in bf16 and 10 in fp16,
where Φ to 1e-7, as in ``csrc/cpu/activation.h``, takes 19; that one stays for fp32.
NaN stays NaN; derivatives at ±inf are their limits, 0 and 1.

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
from fastmp.backends.triton.kernels.numerics import reciprocal
from fastmp.backends.triton.tiles import SUM_SPLITS_TILE, activation_tile

# The only globals that the kernels read.
_NONE = tl.constexpr(int(Activation.NONE))
_RELU = tl.constexpr(int(Activation.RELU))
_GELU = tl.constexpr(int(Activation.GELU))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
_SILU = tl.constexpr(int(Activation.SILU))
_BF16 = tl.constexpr(tl.bfloat16)
_FP32 = tl.constexpr(tl.float32)


@triton.jit
def _clamp(z, LIMIT: tl.constexpr):
    """z, limited to ±LIMIT; NaN stays NaN."""
    return tl.clamp(z, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normal(z):
    """exp(-z²/2) and Φ(z), for |z| up to 1e18.

    Φ(-|z|) = exp(-z²/2) q(u), u = 1 / (1 + 0.3 |z|), q a polynomial fitted to 1.3e-7 relative.
    """
    u = reciprocal(tl.abs(z) * 0.3 + 1.0)
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
def _share(z, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """act(z) / z = 1 / (1 + e), and e = 2^(z p(z²)): two special functions and the FMAs of p.

    gelu in 16 bits: minimax fits of benchmarks/tools/fit_activation.py. The error of gelu(-|z|) is
    at most 1.7e-3 of it in bf16, down to -5.5, where torch's own is 0 or off by more than itself;
    6.2e-5 of it and 4e-9 in fp16. Beyond, p falls further, and the results go to 0 early.
    """
    q = z * z
    if ACTIVATION == _SILU:
        p = -1.44269504  # log2(e)
    elif ACTIVATION == _GELU_TANH:
        p = q * -0.102943240 - 2.30220819  # 2 √(2/π) log2(e) (1 + 0.044715 q)
    elif DTYPE == _BF16:
        p = q * -1.25100779e-05 + 0.00139897102
        p = p * q - 0.109060779
        p = p * q - 2.29888782
    else:
        p = q * -2.17191072e-09 + 2.01014293e-07
        p = p * q - 7.24526135e-06
        p = p * q + 0.000113819652
        p = p * q + 0.00033435286
        p = p * q - 0.105379657
        p = p * q - 2.30183996
    e = tl.exp2(z * p)
    return reciprocal(1.0 + e), e


@triton.jit
def _share_slope(z, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """r(z²) in act'(z) = s + z s (1 - s) r for the share s; of gelu to 1.8e-3 and 1e-4 as above."""
    q = z * z
    if ACTIVATION == _SILU:
        return 1.0
    elif ACTIVATION == _GELU_TANH:
        return q * 0.214064392 + 1.59576912  # 2 √(2/π) (1 + 3 · 0.044715 q)
    elif DTYPE == _BF16:
        r = q * 5.83748519e-05 - 0.0047554219
        r = r * q + 0.225722999
        return r * q + 1.59675876
    else:
        r = q * 1.74066729e-08 - 1.40280622e-06
        r = r * q + 4.23671671e-05
        r = r * q - 0.000524695255
        r = r * q - 0.00127664038
        r = r * q + 0.219312219
        return r * q + 1.59547171


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """act(z) in fp32, as exact as DTYPE asks for."""
    if ACTIVATION == _NONE:
        return z
    elif ACTIVATION == _RELU:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == _GELU and DTYPE == _FP32:
        _, distribution = _normal(_clamp(z, 15.0))  # beyond it is 0 or 1
        return z * distribution
    else:
        share, _ = _share(z, ACTIVATION, DTYPE)
        return z * share


@triton.jit
def gradient(grad, saved, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """grad · act'(z) in fp32, as exact as DTYPE asks for; saved is z, or y for relu."""
    if ACTIVATION == _RELU:
        return tl.where(saved <= 0, 0.0, grad)
    elif ACTIVATION == _GELU and DTYPE == _FP32:
        z = _clamp(saved, 15.0)  # beyond it is 0 or 1
        density, distribution = _normal(z)
        return grad * (distribution + z * 0.398942280 * density)
    else:
        z = _clamp(saved, 110.0 if ACTIVATION == _SILU else 15.0)
        share, e = _share(z, ACTIVATION, DTYPE)
        complement = 1.0 - share
        if DTYPE == _FP32:  # relative precision where it is small too
            complement = tl.where(z < 0, complement, e * share)
        rest = z * complement * _share_slope(z, ACTIVATION, DTYPE)
        return grad * (share * rest + share)


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
            b_dz = gradient(b_dz, b_saved, ACTIVATION, dz.dtype.element_ty)
            tl.store(dz + o_row + o_tile, b_dz.to(dz.dtype.element_ty), mask=mask)
            if y is not None:
                b_y = activate(b_saved, ACTIVATION, y.dtype.element_ty)
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
