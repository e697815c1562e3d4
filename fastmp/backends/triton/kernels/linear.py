"""The product of a linear layer with bias and activation in its epilogue.

::

    z = x Wᵀ + b        y = act(z)        x (M, K), W (N, K), b (N), y and z (M, N)

Bytes, 16-bit: 2 (M K + N K + N + M N), and 2 M N more where the backward needs z. The activation
costs no pass of its own: a product of the vendor library writes z, and the pass after it reads z
and writes y, 4 M N.

Tiles: the sums of a tile stay in fp32 on the chip over all of K; bias and activation are applied to
them there, and each result is rounded once. ``tiles.py`` has the tile for each shape. The order of
tiles is grouped, GROUP_M tiles down before one across: the multiprocessors then read the same few
rows of x and W at the same time, from L2.

On sm_90 and sm_100 the kernel is persistent and the tensor memory accelerator moves whole tiles: no
thread computes an address, the next tile's operands are on their way during an epilogue, and
results leave shared memory while the threads go on. On sm_80 and sm_120 each thread copies 16 bytes
at a time to shared memory, in the background (cp.async). The epilogue takes a tile in two halves:
shared memory has room for one next to four stages of operands (192 KB + 32 KB of 227), and all of
128 x 128 at once, y and z, spilled up to 26 registers on sm_80 and sm_120.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmp.backends.abi import ACTIVATION_CODES
from fastmp.backends.torch_linear import saves_preactivation
from fastmp.backends.triton import architecture, num_sms
from fastmp.backends.triton.kernels.activation import activate
from fastmp.backends.triton.tiles import GROUP_M, VECTOR, LinearTile, linear_tile


@triton.jit
def _tile_start(i_tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: GROUP_M tiles down, then the next ones across."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = i_tile // tiles_in_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    i_in_group = i_tile % tiles_in_group
    return (first_m + i_in_group % group_m) * BLOCK_M, i_in_group // group_m * BLOCK_N


@triton.jit
def _split_columns(b_acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile, each thread's own elements."""
    b_pair = tl.reshape(b_acc, (BLOCK_M, 2, BLOCK_N // 2))
    return tl.split(tl.permute(b_pair, (0, 2, 1)))


@triton.jit
def _add_bias(b_acc, bias, o_n, N):
    """z of a tile of sums; o_n: the columns of the tile."""
    if bias is not None:
        b_bias = tl.load(bias + o_n, mask=o_n < N, other=0.0)
        b_acc += b_bias.to(tl.float32)[None, :]
    return b_acc


@triton.jit
def _store_half(
    b_acc,
    bias,  # (N)
    y,  # (M, N), a descriptor
    z,  # (M, N), a descriptor, or None
    start_m, start_n, N, ACTIVATION: tl.constexpr, HALF_N: tl.constexpr,
):  # fmt: skip
    o_n = start_n + tl.arange(0, HALF_N)
    b_z = _add_bias(b_acc, bias, o_n, N)
    y.store([start_m, start_n], activate(b_z, ACTIVATION, y.dtype).to(y.dtype))
    if z is not None:
        z.store([start_m, start_n], b_z.to(y.dtype))


@triton.jit
def _linear_tma_kernel(
    x,  # (M, K), a descriptor
    w,  # (N, K), a descriptor
    bias,  # (N) or None
    y,  # (M, N), a descriptor
    z,  # (M, N), a descriptor, or None
    M, N, K, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Persistent. Descriptors read 0 outside of their tensor and write nothing there."""
    HALF_N: tl.constexpr = BLOCK_N // 2
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    # The tile whose sums are complete. Counted apart from the loop, which is far ahead in its
    # loads: that index would occupy registers all the way.
    i_done = tl.program_id(0) - tl.num_programs(0)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        start_m, start_n = _tile_start(i_tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in range(steps):
            b_x = x.load([start_m, i_k * BLOCK_K])
            b_w = w.load([start_n, i_k * BLOCK_K])
            b_acc = tl.dot(b_x, b_w.T, b_acc)
        i_done += tl.num_programs(0)
        start_m, start_n = _tile_start(i_done, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        b_left, b_right = _split_columns(b_acc, BLOCK_M, BLOCK_N)
        _store_half(b_left, bias, y, z, start_m, start_n, N, ACTIVATION, HALF_N)
        _store_half(b_right, bias, y, z, start_m, start_n + HALF_N, N, ACTIVATION, HALF_N)


@triton.jit
def _store_rows(
    b_acc,
    bias,  # (N)
    y,  # (M, N), contiguous
    z,  # (M, N), contiguous, or None
    start_m, start_n, M, N, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = y.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    b_z = _add_bias(b_acc, bias, start_n + o_n, N)
    o_tile = start_m.to(tl.int64) * N + start_n
    o_y = o_m[:, None] * N + o_n[None, :]
    mask = (o_m < M - start_m)[:, None] & (o_n < N - start_n)[None, :]
    tl.store(y + o_tile + o_y, activate(b_z, ACTIVATION, DTYPE).to(DTYPE), mask=mask)
    if z is not None:
        tl.store(z + o_tile + o_y, b_z.to(DTYPE), mask=mask)


@triton.jit
def _linear_kernel(
    x,  # (M, K)
    w,  # (N, K)
    bias,  # (N) or None
    y,  # (M, N), contiguous
    z,  # (M, N), contiguous, or None
    M, N, K, stride_x, stride_w, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One tile a program. All sizes but M are multiples of VECTOR; stated here for the compiler.

    Within a tile offsets are 32-bit, from a pointer that is one address for all threads.
    """
    N = N // VECTOR * VECTOR
    K = K // VECTOR * VECTOR
    stride_x = stride_x // VECTOR * VECTOR
    stride_w = stride_w // VECTOR * VECTOR
    start_m, start_n = _tile_start(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # Rows beyond the last one are the last one again: no mask, and their sums are not stored.
    o_x = (tl.minimum(o_m, M - 1 - start_m) * stride_x)[:, None] + o_k[None, :]
    o_w = (tl.minimum(o_n, N - 1 - start_n) * stride_w)[None, :] + o_k[:, None]
    p_x = x + start_m.to(tl.int64) * stride_x
    p_w = w + start_n.to(tl.int64) * stride_w
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        m_k = o_k < K - i_k * BLOCK_K
        b_x = tl.load(p_x + o_x, mask=m_k[None, :], other=0.0)
        b_w = tl.load(p_w + o_w, mask=m_k[:, None], other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc)
        p_x += BLOCK_K
        p_w += BLOCK_K
    if BLOCK_N >= 128:
        HALF_N: tl.constexpr = BLOCK_N // 2
        b_acc, b_right = _split_columns(b_acc, BLOCK_M, BLOCK_N)
        _store_rows(
            b_right, bias, y, z, start_m, start_n + HALF_N, M, N, ACTIVATION, BLOCK_M, HALF_N
        )
        _store_rows(b_acc, bias, y, z, start_m, start_n, M, N, ACTIVATION, BLOCK_M, HALF_N)
    else:
        _store_rows(b_acc, bias, y, z, start_m, start_n, M, N, ACTIVATION, BLOCK_M, BLOCK_N)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """y, and z or an empty tensor; for operands that ``supports_operands`` accepts.

    Args:
        input: (M, K).
        weight: (N, K), the dtype of input.
        bias: (N), the dtype of input, or None.
        activation: a key of ``ACTIVATION_CODES``.
        save: whether to return z; ignored where the backward does not need it.
    """
    (m, k), n = input.shape, weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = input.new_empty(m, n)
    z = input.new_empty(m, n) if save and saves_preactivation(activation) else None
    tile = linear_tile(m, k, architecture(input.device))
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    options = {
        "ACTIVATION": ACTIVATION_CODES[activation],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": GROUP_M,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if tile.tma:
        programs = min(tiles, tile.programs_per_sm * num_sms(input.device))
        _linear_tma_kernel[(programs,)](
            *_descriptors(input, weight, bias, y, z, tile), m, n, k, **options
        )
    else:
        _linear_kernel[(tiles,)](
            input, weight, bias, y, z, m, n, k, input.stride(0), weight.stride(0),
            VECTOR=VECTOR, **options,
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
    half = [tile.block_m, tile.block_n // 2]
    return (
        TensorDescriptor.from_tensor(input, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        bias,
        TensorDescriptor.from_tensor(y, half),
        None if z is None else TensorDescriptor.from_tensor(z, half),
    )
