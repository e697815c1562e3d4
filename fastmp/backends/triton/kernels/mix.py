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

Tiles: a row is a stretch of one plane, so what depends on sample and channel is looked up once for
a row. A thread takes vectors of which the wider one, in or out, is 16 bytes, so that a warp's
accesses are one dense run each: 8 elements for uint8 to fp16, 8 bytes in and 16 out. With 16 there
would be two stores, each of half a 32-byte sector. Where nothing depends on the channel, planes are
whole images. Vectors are an axis of the tile: masks are said for each vector, so that accesses
cannot fall apart, and a division for each vector finds its place in the image.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmp.backends.triton.tiles import mix_tile

# Offsets into the batch are always 64 bits wide. Rows and places in a plane are 32 below this,
# because GPUs divide 64-bit integers in a long subroutine.
_NARROW = 2**31


@triton.jit
def _load(place, inside):
    """As fp32. A byte as the end of 2^23's mantissa needs no conversion, which is a slow one."""
    x = tl.load(place, mask=inside, other=0)
    if x.dtype == tl.uint8:
        return (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        return x.to(tl.float32)


@triton.jit
def _divide(number, by):
    """Neither is negative: unsigned, mixup of bytes, 3 x 32 x 32, is 8% fewer instructions."""
    if number.dtype == tl.int64:
        return (number.to(tl.uint64) // tl.cast(by, tl.uint64)).to(tl.int64)
    else:
        return (number.to(tl.uint32) // tl.cast(by, tl.uint32)).to(tl.int32)


@triton.jit
def _per_channel(values, channel, there):
    return tl.load(values + channel, mask=there, other=0.0).to(tl.float32)[:, None, None]


@triton.jit
def _edge(box, which: tl.constexpr, there):
    return tl.load(box + which, mask=there, other=0).to(tl.int32)[:, None, None]


@triton.jit
def _place_in_box(box, at, width, there, VECTOR: tl.constexpr):
    """For vectors at these elements of a plane: columns right of the box's edge, and its width.

    Above and below the box both are its width, which is to say right of it.
    """
    vectors = width // VECTOR
    row = _divide(at // VECTOR, vectors)
    column = (at // VECTOR - row * vectors) * VECTOR
    left = _edge(box, 2, there)
    reach = tl.maximum(_edge(box, 3, there) - left, 0)
    beside = (row >= _edge(box, 0, there)) & (row < _edge(box, 1, there))
    return tl.where(beside, column - left, reach), reach


@triton.jit
def _mix_kernel(
    input, output, lam, lam_stride, index, box, box_stride, scale, shift, batch, channels, plane,
    width, parts, rows, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Rows are counted part by part of a plane, plane by plane; ROW is the type that holds them."""
    row = tl.program_id(0).to(ROW) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    of_batch = _divide(row, parts)
    start = (row - of_batch * parts) * BLOCK
    sample = _divide(of_batch, channels)
    channel = of_batch - sample * channels
    size = plane // VECTOR * VECTOR  # the compiler learns what divides it
    vector = (tl.arange(0, BLOCK // VECTOR) * VECTOR)[None, :, None]
    element = vector + tl.arange(0, VECTOR)[None, None, :]
    length = tl.where(there, tl.minimum(size - start, BLOCK), 0).to(tl.int32)
    inside = vector < length[:, None, None]
    here = of_batch.to(tl.int64) * size + start

    if index is not None:
        other = tl.load(index + sample, mask=there, other=0)
        valid = (other >= 0) & (other < batch)
        other = tl.where(valid, other, sample)
        partner = input + ((other * channels + channel) * size + start)[:, None, None] + element
        valid = valid[:, None, None]
    own_inside = inside
    if box is not None:
        corner = box + sample * box_stride
        at, reach = _place_in_box(corner, start[:, None, None] + vector, width, there, VECTOR)
        own_inside = inside & ((at < 0) | (at + VECTOR > reach))
        partner_inside = inside & (at + VECTOR > 0) & (at < reach)
        x_partner = _load(partner, partner_inside)
    elif index is not None:
        x_partner = _load(partner, inside)
    x = _load(input + here[:, None, None] + element, own_inside)

    if box is not None:  # choose first: then there is one to normalise
        lane = at + tl.arange(0, VECTOR)[None, None, :]
        x = tl.where(lane.to(tl.uint32) < reach.to(tl.uint32), x_partner, x)
    if scale is not None:
        slope = _per_channel(scale, channel, there)
        offset = _per_channel(shift, channel, there)
        if box is not None:
            offset = tl.where(valid, offset, float("nan"))
        x = x * slope + offset
    if box is not None:
        if scale is None:
            x = tl.where(valid, x, float("nan"))
    elif index is not None:
        if scale is not None:
            x_partner = x_partner * slope + offset
        share = tl.load(lam + sample * lam_stride, mask=there, other=0.0).to(tl.float32)
        share = tl.where(valid, share[:, None, None], float("nan"))
        x = share * x + (1.0 - share) * x_partner
    result = x.to(output.dtype.element_ty)
    tl.store(output + here[:, None, None] + element, result, mask=inside, cache_modifier=".cs")


def _vector(input: Tensor, output: Tensor, plane: int, width: int | None) -> int:
    """How many elements an access takes: 16 bytes of the wider dtype, or what divides the sizes."""
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
    parts = triton.cdiv(plane, tile.block)
    wide = max(planes * parts + tile.rows, plane + tile.block) >= _NARROW
    index, box, scale, shift = (
        None if t is None else t.contiguous() for t in (index, box, scale, shift)
    )
    _mix_kernel[(triton.cdiv(planes * parts, tile.rows),)](
        input, output, None if box is not None else lam,
        0 if lam is None or lam.dim() == 0 else lam.stride(0), index, box,
        4 if box is not None and box.dim() == 2 else 0, scale, shift, batch, channels, plane,
        width, parts, planes * parts, ROW=tl.int64 if wide else tl.int32, ROWS=tile.rows,
        BLOCK=tile.block, VECTOR=vector, num_warps=tile.warps,
    )  # fmt: skip
    return output
