"""The product of a linear layer with bias and activation in its epilogue.

::

    z = x Wᵀ + b        y = act(z)        x (M, K), W (N, K), b (N), y and z (M, N)

Bytes, 16-bit: 2 (M K + N K + N + M N), and 2 M N more where the backward needs z. The activation
costs no pass of its own: a product of the vendor library writes z, and the pass after it reads z
and writes y, 4 M N.

Tiles: the sums of a tile stay in fp32 on the chip over all of K; bias and activation are applied to
them there, and each result is rounded once. ``tiles.py`` says which tile for which shape. A
multiprocessor takes its tiles in turn, LINEAR_GROUP tiles down before one across: the multi-
processors then read the same few strips of x and W at the same time, from L2.

On sm_90 and sm_100 the tensor memory accelerator moves whole tiles: no thread computes an address,
the next tile's operands are on their way during an epilogue, and results leave shared memory while
the threads go on. The epilogue takes a tile in two halves, for which shared memory has room next to
four stages of operands (192 KB + 32 KB of 227). On sm_80 and sm_120 each thread copies 16 bytes at
a time to shared memory, in the background (cp.async).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmp.backends.abi import Activation
from fastmp.backends.triton import architecture, num_sms
from fastmp.backends.triton.kernels.activation import activate
from fastmp.backends.triton.tiles import LINEAR_GROUP, LinearTile, linear_tile

# 16 bytes of a 16-bit dtype.
_VECTOR = 8


@triton.jit
def _position(tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP tiles down, then the next ones across."""
    down = tl.cdiv(rows, ROWS)
    in_group = GROUP * tl.cdiv(columns, COLUMNS)
    first = tile // in_group * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % in_group
    return (first + within % height) * ROWS, within // height * COLUMNS


@triton.jit
def _halves(sums, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile, each thread's own elements."""
    pair = tl.reshape(sums, (ROWS, 2, COLUMNS // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


@triton.jit
def _epilogue(sums, bias, column, columns, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """y and z of a tile of sums, rounded; column: of its elements."""
    if bias is not None:
        b = tl.load(bias + column, mask=column < columns, other=0.0)
        sums += b.to(tl.float32)[None, :]
    return activate(sums, ACTIVATION).to(DTYPE), sums.to(DTYPE)


@triton.jit
def _store_half(sums, bias, y, z, row, column, columns, ACTIVATION: tl.constexpr,
                HALF: tl.constexpr):  # fmt: skip
    lane = column + tl.arange(0, HALF)
    half_y, half_z = _epilogue(sums, bias, lane, columns, ACTIVATION, y.dtype)
    y.store([row, column], half_y)
    if z is not None:
        z.store([row, column], half_z)


@triton.jit
def _linear_tma_kernel(
    input, weight, bias, y, z, rows, columns, depth, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All but bias are tensor descriptors: what lies outside reads as 0 and is not written."""
    HALF: tl.constexpr = COLUMNS // 2
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    steps = tl.cdiv(depth, DEPTH)
    # The tile whose sums are ready. Counted apart from the loop, which is far ahead in its loads:
    # that position would occupy registers all the way.
    ready = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _position(tile, rows, columns, ROWS, COLUMNS, GROUP)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            x = input.load([row, step * DEPTH])
            w = weight.load([column, step * DEPTH])
            sums = tl.dot(x, w.T, sums)
        ready += tl.num_programs(0)
        row, column = _position(ready, rows, columns, ROWS, COLUMNS, GROUP)
        left, right = _halves(sums, ROWS, COLUMNS)
        _store_half(left, bias, y, z, row, column, columns, ACTIVATION, HALF)
        _store_half(right, bias, y, z, row, column + HALF, columns, ACTIVATION, HALF)


@triton.jit
def _linear_kernel(
    input, weight, bias, y, z, rows, columns, depth, input_stride, weight_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile a program. All but rows is a multiple of VECTOR; said here, the compiler knows.

    Within a tile offsets are 32-bit, from a base that is one address for all threads.
    """
    columns = columns // VECTOR * VECTOR
    depth = depth // VECTOR * VECTOR
    input_stride = input_stride // VECTOR * VECTOR
    weight_stride = weight_stride // VECTOR * VECTOR
    row, column = _position(tl.program_id(0), rows, columns, ROWS, COLUMNS, GROUP)
    line = tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows beyond the last one are the last one again: no mask, and their sums are not stored.
    x_lane = (tl.minimum(line, rows - 1 - row) * input_stride)[:, None] + k[None, :]
    w_lane = (tl.minimum(lane, columns - 1 - column) * weight_stride)[None, :] + k[:, None]
    input += row.to(tl.int64) * input_stride
    weight += column.to(tl.int64) * weight_stride
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(depth, DEPTH)):
        inside = k < depth - step * DEPTH
        x = tl.load(input + x_lane, mask=inside[None, :], other=0.0)
        w = tl.load(weight + w_lane, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, w, sums)
        input += DEPTH
        weight += DEPTH
    tile_y, tile_z = _epilogue(sums, bias, column + lane, columns, ACTIVATION, y.dtype.element_ty)
    base = row.to(tl.int64) * columns + column
    place = line[:, None] * columns + lane[None, :]
    inside = (line < rows - row)[:, None] & (lane < columns - column)[None, :]
    tl.store(y + base + place, tile_y, mask=inside)
    if z is not None:
        tl.store(z + base + place, tile_z, mask=inside)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """y, and z or an empty tensor; for what ``supports_operands`` allows.

    Args:
        input: (rows, depth).
        weight: (columns, depth), the dtype of input.
        bias: (columns), the dtype of input, or None.
        activation: the name of one of ``Activation``.
        save: whether to return z; ignored where the backward does not need it.
    """
    code = Activation[activation.upper()]
    (rows, depth), columns = input.shape, weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = input.new_empty(rows, columns)
    keep = save and code not in (Activation.NONE, Activation.RELU)
    z = input.new_empty(rows, columns) if keep else None
    tile = linear_tile(rows, depth, architecture(input.device))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    options = {
        "ACTIVATION": int(code),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": LINEAR_GROUP,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if tile.tma:
        programs = min(tiles, tile.programs * num_sms(input.device))
        _linear_tma_kernel[(programs,)](
            *_descriptors(input, weight, bias, y, z, tile), rows, columns, depth, **options
        )
    else:
        _linear_kernel[(tiles,)](
            input, weight, bias, y, z, rows, columns, depth, input.stride(0), weight.stride(0),
            VECTOR=_VECTOR, **options,
        )  # fmt: skip
    return y, input.new_empty(0) if z is None else z


def _descriptors(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    tile: LinearTile,
) -> tuple[Any, ...]:
    """The tensors as the kernel with TMA takes them: by operand tiles, and by half tiles of y."""
    half = [tile.rows, tile.columns // 2]
    return (
        TensorDescriptor.from_tensor(input, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        bias,
        TensorDescriptor.from_tensor(y, half),
        None if z is None else TensorDescriptor.from_tensor(z, half),
    )
