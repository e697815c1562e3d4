"""Mixup and cutmix of a batch of images, with normalisation and cast, in one pass.

For channel c of sample i, j = index[i]::

    norm(x) = scale_c x + shift_c
    mixup     out = λ_i norm(x_i) + (1-λ_i) norm(x_j)
    cutmix    out = norm(x_j) inside the box, norm(x_i) outside
    no index  out = norm(x_i)

Bytes per element, uint8 to fp16: 1 read (mixup: 2, the second mostly from L2, where 256 images of
3 x 224 x 224 bytes, 38 MB, fit) and 2 written. The result is stored to be evicted first: 77 MB of
it would push the batch out of L2 before its second use. Cutmix reads for each vector the image
that its pixels come from, and both only where a box begins or ends inside the vector: 1 byte read.

Tiles: a row of a tile is a contiguous range of one plane, so values of a sample and channel are
loaded once for it. A thread takes vectors of which the wider one, in or out, is 16 bytes, so that
a warp's accesses are contiguous: 8 elements for uint8 to fp16, 8 bytes in and 16 out. With 16 there
would be two stores, each of half a 32-byte sector. Where nothing depends on the channel, planes are
whole images. Vectors are an axis of the tile: there is one mask for each vector, so that accesses
cannot be split, and one division for each vector, for its row and column in the image.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.triton.tiles import mix_tile

# Offsets into the batch always have 64 bits. Indices of ranges and offsets in a plane have 32 below
# this limit, because GPUs divide 64-bit integers in a long subroutine.
_INT32_LIMIT = 2**31


@triton.jit
def _load(p_x, mask):
    """As fp32. A byte as the end of 2^23's mantissa needs no conversion, which is a slow one."""
    b_x = tl.load(p_x, mask=mask, other=0)
    if b_x.dtype == tl.uint8:
        return (b_x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        return b_x.to(tl.float32)


@triton.jit
def _divide(number, by):
    """Neither is negative: unsigned, mixup of bytes, 3 x 32 x 32, is 8% fewer instructions."""
    if number.dtype == tl.int64:
        return (number.to(tl.uint64) // tl.cast(by, tl.uint64)).to(tl.int64)
    else:
        return (number.to(tl.uint32) // tl.cast(by, tl.uint32)).to(tl.int32)


@triton.jit
def _load_channel(p_c, i_c, m_r):
    return tl.load(p_c + i_c, mask=m_r, other=0.0).to(tl.float32)[:, None, None]


@triton.jit
def _load_edge(p_box, EDGE: tl.constexpr, m_r):
    return tl.load(p_box + EDGE, mask=m_r, other=0).to(tl.int32)[:, None, None]


@triton.jit
def _columns_in_box(p_box, o_hw, W, m_r, VECTOR: tl.constexpr):
    """Columns from the box's left edge to the vectors at o_hw of a plane, and the box's width.

    Above and below the box both are its width: outside of it, on the right.
    """
    vectors = W // VECTOR
    row = _divide(o_hw // VECTOR, vectors)
    column = (o_hw // VECTOR - row * vectors) * VECTOR
    left = _load_edge(p_box, 2, m_r)
    box_w = tl.maximum(_load_edge(p_box, 3, m_r) - left, 0)
    m_row = (row >= _load_edge(p_box, 0, m_r)) & (row < _load_edge(p_box, 1, m_r))
    return tl.where(m_row, column - left, box_w), box_w


@triton.jit
def _mix_kernel(
    x,  # (N, C, H, W)
    out,  # (N, C, H, W)
    lam, stride_lam,  # (), stride 0, or (N); or None
    index,  # (N), int64, or None
    box, stride_box,  # (4), stride 0, or (N, 4), int64; or None
    scale, shift,  # (C) each, or None
    N, C, HW, W, ranges_per_plane, ranges, INDEX: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_R ranges of BLOCK elements, counted along a plane, then plane by plane.

    INDEX is the integer type that holds their number.
    """
    o_r = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < ranges
    i_plane = _divide(o_r, ranges_per_plane)
    o_hw = (o_r - i_plane * ranges_per_plane) * BLOCK
    i_n = _divide(i_plane, C)
    i_c = i_plane - i_n * C
    HW = HW // VECTOR * VECTOR  # tells the compiler what divides it
    o_v = (tl.arange(0, BLOCK // VECTOR) * VECTOR)[None, :, None]
    o_e = o_v + tl.arange(0, VECTOR)[None, None, :]
    length = tl.where(m_r, tl.minimum(HW - o_hw, BLOCK), 0).to(tl.int32)
    mask = o_v < length[:, None, None]
    o_x = i_plane.to(tl.int64) * HW + o_hw

    if index is not None:
        i_partner = tl.load(index + i_n, mask=m_r, other=0)
        m_valid = (i_partner >= 0) & (i_partner < N)
        i_partner = tl.where(m_valid, i_partner, i_n)
        p_partner = x + ((i_partner * C + i_c) * HW + o_hw)[:, None, None] + o_e
        m_valid = m_valid[:, None, None]
    m_x = mask
    if box is not None:
        p_box = box + i_n * stride_box
        o_box, box_w = _columns_in_box(p_box, o_hw[:, None, None] + o_v, W, m_r, VECTOR)
        m_x = mask & ((o_box < 0) | (o_box + VECTOR > box_w))
        m_partner = mask & (o_box + VECTOR > 0) & (o_box < box_w)
        b_partner = _load(p_partner, m_partner)
    elif index is not None:
        b_partner = _load(p_partner, mask)
    b_x = _load(x + o_x[:, None, None] + o_e, m_x)

    if box is not None:  # select first: then there is one to normalise
        o_pixel = o_box + tl.arange(0, VECTOR)[None, None, :]
        b_x = tl.where(o_pixel.to(tl.uint32) < box_w.to(tl.uint32), b_partner, b_x)
    if scale is not None:
        b_scale = _load_channel(scale, i_c, m_r)
        b_shift = _load_channel(shift, i_c, m_r)
        if box is not None:
            b_shift = tl.where(m_valid, b_shift, float("nan"))
        b_x = b_x * b_scale + b_shift
    if box is not None:
        if scale is None:
            b_x = tl.where(m_valid, b_x, float("nan"))
    elif index is not None:
        if scale is not None:
            b_partner = b_partner * b_scale + b_shift
        b_lam = tl.load(lam + i_n * stride_lam, mask=m_r, other=0.0).to(tl.float32)
        b_lam = tl.where(m_valid, b_lam[:, None, None], float("nan"))
        b_x = b_lam * b_x + (1.0 - b_lam) * b_partner
    b_out = b_x.to(out.dtype.element_ty)
    tl.store(out + o_x[:, None, None] + o_e, b_out, mask=mask, cache_modifier=".cs")


def _vector(input: Tensor, output: Tensor, plane: int, width: int | None) -> int:
    """Elements of an access: 16 bytes of the wider dtype, or fewer if they do not divide a size."""
    if input.data_ptr() % 16 or output.data_ptr() % 16:
        return 1
    widest = 16 // max(input.element_size(), output.element_size())
    return math.gcd(widest, plane if width is None else width)


def mix(
    input: Tensor,
    lam: Tensor | None,
    index: Tensor | None,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mixed batch, (N, C, H, W), contiguous; arguments as ``ops.mix.mix_reference``.

    An index out of range cannot be refused without waiting for the device: its sample becomes NaN.

    Args:
        input: uint8, fp16, bf16 or fp32.
        dtype: fp16, bf16 or fp32.
    """
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    if output.numel() == 0:
        return output
    input = input.contiguous()
    batch, channels, height, width = input.shape
    if index is None or (lam is None and box is None):
        lam = index = box = None
    planes, plane = batch * channels, height * width
    if box is None and scale is None:
        planes, plane, channels = batch, channels * plane, 1
        if index is None:
            planes, plane = 1, planes * plane
    vector = _vector(input, output, plane, None if box is None else width)
    tile = mix_tile(plane, input.element_size(), vector)
    ranges_per_plane = triton.cdiv(plane, tile.block)
    ranges = planes * ranges_per_plane
    wide = max(ranges + tile.ranges, plane + tile.block) >= _INT32_LIMIT
    index, box, scale, shift = (
        None if t is None else t.contiguous() for t in (index, box, scale, shift)
    )
    _mix_kernel[(triton.cdiv(ranges, tile.ranges),)](
        input, output, None if box is not None else lam,
        0 if lam is None or lam.dim() == 0 else lam.stride(0), index, box,
        4 if box is not None and box.dim() == 2 else 0, scale, shift, batch, channels, plane,
        width, ranges_per_plane, ranges, INDEX=tl.int64 if wide else tl.int32,
        BLOCK_R=tile.ranges, BLOCK=tile.block, VECTOR=vector, num_warps=tile.warps,
    )  # fmt: skip
    return output
