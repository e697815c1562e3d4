"""The activations of a linear layer, their derivatives, and the gradients of activation and bias.

::

    relu       max(z, 0)
    gelu       z Φ(z), Φ the normal distribution
    gelu_tanh  z σ(2 √(2/π) (z + 0.044715 z³)), which is its tanh form
    silu       z σ(z)

    dz = dy · act'(z)       db = Σ_rows dz

The formulas and coefficients are those of ``csrc/cpu/activation.h``: one exponential each, shared
between value and derivative. NaN stays NaN; derivatives at ±inf are their limits, 0 and 1.

Bytes of the gradients, 16-bit: 4 read and 2 written for each element, 2 read with activation none;
and for each column of a strip of rows 4 written and read again, which is 1/24 of that for the
shortest strip, 32 rows, and 1/300 for one of 400.

Tiles: 128 columns are 256 bytes of a row, whole cache lines, and 32 rows of them are 32 elements a
thread. That is 8 loads of 16 bytes in flight, 16 KB a program and 64 KB on a multiprocessor, twice
what its share of the bandwidth needs (4.8 TB/s · 0.8 us / 132 = 29 KB). Every thread adds up its
own columns of a whole strip; the threads meet once, at its end. The strips are then added in a
fixed order by a second kernel: no atomics, two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.abi import Activation
from fastmp.backends.triton import num_sms
from fastmp.backends.triton.kernels.numerics import exp
from fastmp.backends.triton.tiles import STRIPS_TILE, activation_tile

# Kernels read no globals but these.
_NONE = tl.constexpr(int(Activation.NONE))
_RELU = tl.constexpr(int(Activation.RELU))
_GELU = tl.constexpr(int(Activation.GELU))
_GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
_TANH_SCALE = tl.constexpr(1.59576912)  # 2 √(2/π)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _within(z, LIMIT: tl.constexpr):
    """z, moved to ±LIMIT if beyond; NaN stays."""
    return tl.clamp(z, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reciprocal(v):
    """1 / v for v from 1 to 1e18, in 4 instructions; a division minds all other v and takes 9."""
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
        _, distribution = _normal(_within(z, 15.0))  # beyond it is 0 or 1
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
        z = _within(saved, 15.0)
        density, distribution = _normal(z)
        return grad * (distribution + z * 0.398942280 * density)
    elif ACTIVATION == _GELU_TANH:
        z = _within(saved, 15.0)
        sigma, complement = _sigmoid(z * _TANH_SCALE * (z * z * _TANH_CUBIC + 1.0))
        slope = z * z * (3.0 * _TANH_CUBIC * _TANH_SCALE) + _TANH_SCALE
        return grad * (sigma + z * slope * sigma * complement)
    else:
        z = _within(saved, 110.0)
        sigma, complement = _sigmoid(z)
        return grad * sigma * (z * complement + 1.0)


@triton.jit
def _activation_backward_kernel(
    grad, saved, dz, parts, rows, columns, strip, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dz, and in parts[strip] its sums over the rows of each strip; either may be missing."""
    # Said as a multiple of VECTOR, so that the compiler knows and takes 16 bytes at a time.
    columns = columns // VECTOR * VECTOR
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    line = tl.arange(0, ROWS)[:, None]
    lane = line * columns + column
    first = tl.program_id(1).to(tl.int64) * strip
    mine = tl.minimum(rows - first, strip).to(tl.int32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, mine, ROWS):
        inside = (row + line < mine) & (column < columns)
        base = (first + row) * columns
        g = tl.load(grad + base + lane, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != _NONE:
            z = tl.load(saved + base + lane, mask=inside, other=0.0).to(tl.float32)
            g = gradient(g, z, ACTIVATION)
            tl.store(dz + base + lane, g.to(dz.dtype.element_ty), mask=inside)
        if parts is not None:
            sums += g
    if parts is not None:
        place = tl.program_id(1).to(tl.int64) * columns + column
        tl.store(parts + place, tl.sum(sums, 0)[None, :], mask=column < columns)


@triton.jit
def _add_strips_kernel(parts, db, strips, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """db = Σ_strips parts, rounded once."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    line = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for strip in range(0, strips, ROWS):
        inside = (strip + line < strips) & (column < columns)
        place = (strip + line).to(tl.int64) * columns + column
        sums += tl.load(parts + place, mask=inside, other=0.0)
    total = tl.sum(sums, 0)[None, :]
    tl.store(db + column, total.to(db.dtype.element_ty), mask=column < columns)


def activation_backward(
    grad: Tensor, saved: Tensor, activation: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dz and db, the latter empty unless needed, in one pass over matrices of rows.

    Args:
        grad: dy, (rows, columns), fp32, fp16 or bf16.
        saved: z, or y for relu, of the same shape; not read for none, whose dz is grad itself.
        activation: the name of one of ``Activation``.
        needs_bias: whether to compute db.
    """
    code = Activation[activation.upper()]
    rows, columns = grad.shape
    db = grad.new_empty(columns if needs_bias else 0)
    if grad.numel() == 0:
        return torch.empty_like(grad), db.zero_()
    if code == Activation.NONE and not needs_bias:
        return grad, db
    dense, saved = grad.contiguous(), saved.contiguous()
    dz = grad if code == Activation.NONE else torch.empty_like(dense)
    widest = 16 // grad.element_size()
    vector = 1 if columns % widest else widest
    tile = activation_tile(rows, columns, vector, num_sms(grad.device))
    strips = triton.cdiv(rows, tile.strip)
    parts = None
    if needs_bias:
        parts = torch.empty(strips, columns, dtype=torch.float32, device=grad.device)
    _activation_backward_kernel[(triton.cdiv(columns, tile.columns), strips)](
        dense, saved, dz, parts, rows, columns, tile.strip, ACTIVATION=int(code), ROWS=tile.rows,
        COLUMNS=tile.columns, VECTOR=vector, num_warps=tile.warps,
    )  # fmt: skip
    if needs_bias:
        height, width, warps = STRIPS_TILE
        _add_strips_kernel[(triton.cdiv(columns, width),)](
            parts, db, strips, columns, ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
    return dz, db
