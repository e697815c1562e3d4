"""Split fp16 masters in plain PyTorch: ``csrc/common/numerics.h`` again.

An fp16 weight and a signed 16-bit remainder are the fp32 master exactly where the weight is above
2^-17 and finite; below, the error is at most 2^-41.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_EXACT = 0x81  # 2^-17 is 0x80
_INF, _NAN = 0x7C00, 0x7E00


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as (fp16 weight, int16 remainder)."""
    signed = value.contiguous().view(torch.int32).to(torch.int64)
    bits = signed & 0x7FFFFFFF
    is_small = bits < 0x38800000
    scaled = torch.where(is_small, value.abs(), 0.0).double() * 2.0**40
    units = (scaled + 0.5).floor().to(torch.int64)
    magnitude = torch.where(is_small, (units + 0x8000) >> 16, (bits - 0x38000000 + 0x1000) >> 13)
    magnitude = torch.where(bits >= 0x477FF000, _INF, magnitude)
    magnitude = torch.where(bits > 0x7F800000, _NAN, magnitude)
    absolute = magnitude.to(torch.int16).view(torch.float16).float().view(torch.int32)
    rest = torch.where(magnitude >= _LEAST_EXACT, bits - absolute, units - (magnitude << 16))
    rest = torch.where(magnitude >= _INF, 0, rest)
    weight = magnitude | (signed >> 16 & 0x8000)
    return weight.to(torch.int16).view(torch.float16), rest.to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that they stand for; it rounds to the weight, whatever the remainder."""
    magnitude = weight.contiguous().view(torch.int16).to(torch.int64) & 0x7FFF
    value, given = weight.float(), remainder.to(torch.int64)
    least = -_half_distance((magnitude - 1).clamp(min=0))
    bounded = given.clamp(least, _half_distance(magnitude) - 1)
    exact = (value.contiguous().view(torch.int32).to(torch.int64) + bounded).to(torch.int32)
    rest = torch.where(magnitude == 0, given.clamp(min=-0x7FFF), given).float() * 2.0**-40
    coarse = value + torch.where(value.signbit(), -rest, rest)
    coarse = torch.where(given == 0, value, coarse)
    finite = torch.where(magnitude >= _LEAST_EXACT, exact.view(torch.float32), coarse)
    return torch.where(magnitude >= _INF, value, finite)


def _half_distance(magnitude: Tensor) -> Tensor:
    """Half of the distance to the next weight, in units of the last place of fp32."""
    far = torch.where(magnitude >= 0x100, 0x4000, 0x8000)
    far = torch.where(magnitude >= 0x200, 0x2000, far)
    return torch.where(magnitude >= 0x400, 0x1000, far)
