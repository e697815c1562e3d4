"""How the states of an element are kept, in plain PyTorch: ``csrc/common/state_kinds.h`` again.

fp32; bf16 rounded stochastically; or 8 bits, a small floating-point number under one power of two
for 32 elements. The random bits of an element at a step depend on (seed, step, param_index,
element) alone, and elements count in the order of memory, so that every device rounds alike.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from torch import Tensor

from fastmp.backends.native_table import is_dense

BLOCK = 32  # elements that share a scale
DROPPED = {torch.bfloat16: 16, torch.uint8: 19}  # bits of an fp32 number that rounding cuts off
_LEAST_SCALE = 32


class Quantity(Enum):
    """What a state is, which decides how a narrow kind rounds it."""

    SIGNED = "a moment with a sign"
    SQUARE = "a second moment"
    MAXIMUM = "a running maximum: rounded to nearest"


def flat(tensor: Tensor) -> Tensor:
    """The elements in the order of memory; a view of a dense tensor."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def blocks_of(numel: int) -> int:
    """The number of scales of a state with so many elements."""
    return -(-numel // BLOCK)


def load(state: Tensor, quantity: Quantity, scales: Tensor | None) -> Tensor:
    """A state as fp32, in its strides.

    Args:
        state: bf16, or uint8 codes.
        quantity: what it is.
        scales: of uint8 codes, one for 32 elements.
    """
    wide = torch.empty_like(state, dtype=torch.float32)
    if state.dtype == torch.uint8:
        assert scales is not None
        flat(wide).copy_(_decode(flat(state), quantity, scales))
    else:
        wide.copy_(state)
    return wide


def store(
    values: Tensor, state: Tensor, quantity: Quantity, scales: Tensor | None, random: Tensor | None
) -> None:
    """The inverse of ``load``, into ``state`` and ``scales``.

    Args:
        values: fp32, in the strides of ``state``.
        state, quantity, scales: as of ``load``.
        random: for each element the bits of ``bits_for_state``, int64; None: round to nearest.
    """
    values = flat(values)
    if state.dtype == torch.uint8:
        assert scales is not None
        codes, of_blocks = _encode(values, quantity, random)
        flat(state).copy_(codes)
        scales.copy_(of_blocks)
    elif random is None or quantity is Quantity.MAXIMUM:
        flat(state).copy_(values)
    else:
        bits = _bits(values) + random
        up = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        flat(state).copy_(torch.where(values.isfinite(), up, values.to(torch.bfloat16)))


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _of_elements(scales: Tensor, numel: int) -> Tensor:
    return scales.to(torch.int64).repeat_interleave(BLOCK)[:numel]


def _decode(codes: Tensor, quantity: Quantity, scales: Tensor) -> Tensor:
    scale = _of_elements(scales, codes.numel())
    signed = quantity is Quantity.SIGNED
    code = codes.to(torch.int64) & (0x7F if signed else 0xFF)
    subnormal = code < 16
    bits = (scale << 23) + (code << 19) - torch.where(subnormal, 0, 1 << 23)
    magnitude = _float(bits) - torch.where(subnormal, _float(scale << 23), 0.0)
    return torch.where((codes >= 0x80) & signed, -magnitude, magnitude)


def _encode(values: Tensor, quantity: Quantity, random: Tensor | None) -> tuple[Tensor, Tensor]:
    signed = quantity is Quantity.SIGNED
    bits = _bits(values.contiguous())
    magnitude = bits & 0x7FFFFFFF
    padded = torch.zeros(blocks_of(len(bits)) * BLOCK, dtype=torch.int64, device=bits.device)
    padded[: len(bits)] = magnitude
    scales = _scales(padded.view(-1, BLOCK).amax(1), below=6 if signed else 14)
    scale = _of_elements(scales, len(bits))
    smallest = _float(scale << 23)
    subnormal = _float(magnitude) < smallest
    shifted = _bits(_float(magnitude) + torch.where(subnormal, smallest, 0.0))
    base = (scale << 23) - torch.where(subnormal, 0, 1 << 23)
    nearest = random is None or quantity is Quantity.MAXIMUM
    dropped = 1 << 18 if nearest or random is None else random
    code = (shifted + dropped - base) >> 19
    code = code.clamp(0 if signed else 1, 0x7F if signed else 0xFF)
    code = code | torch.where((bits >> 31 == 1) & signed, 0x80, 0)
    usable = (scale != 0) & (scale != 255)
    return torch.where(usable, code, 0).to(torch.uint8), scales.to(torch.uint8)


def _scales(largest: Tensor, below: int) -> Tensor:
    top = (largest + 0x7FFFF) >> 23
    scales = (top - below).clamp(_LEAST_SCALE, 254 - below)
    scales = torch.where(largest == 0, 0, scales)
    return torch.where(largest >= 0x7F800000, 255, scales)


# ---- random bits ----

_MASK64 = (1 << 64) - 1


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31


def random_words(seed: int, step: Tensor, param_index: int, numel: int) -> Tensor:
    """32 random bits for each element of a parameter at a step, int64; four share a hash."""
    key = _mix((seed + 0x9E3779B97F4A7C15) & _MASK64)
    for part in (int(np.float32(float(step)).view(np.uint32)), param_index, 0):
        key = _mix(key + part & _MASK64)
    elements = torch.arange(numel, device=step.device)
    x = (elements >> 2) ^ (key & 0xFFFFFFFF)
    x = ((x ^ x >> 16) * 0x7FEB352D + (key >> 32)) & 0xFFFFFFFF
    x = _low_product(x ^ x >> 15, 0x846CA68B)
    for place in range(3):
        x = torch.where(elements % 4 > place, _low_product(x, 0x2C9277B5), x)
    return x ^ x >> 16


def _low_product(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product of 32-bit numbers, which may not fit into 63."""
    high = (x * (factor >> 16) & 0xFFFF) << 16
    return high + x * (factor & 0xFFFF) & 0xFFFFFFFF


def bits_for_state(words: Tensor, index: int, dtype: torch.dtype) -> Tensor:
    """The random bits of a state, as many as rounding drops: the first and the second share a word.

    Args:
        words: of ``random_words``.
        index: of the state.
        dtype: bf16, or uint8 for codes.
    """
    dropped = DROPPED[dtype]
    return words & ((1 << dropped) - 1) if index == 0 else words >> (32 - dropped)
