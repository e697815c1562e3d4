"""Pixels of every Pillow mode as 8 bits: wide values scaled, transparency on white, upright.

What a plain ``convert`` does instead: values of 16 and 32 bits are cut off at 255, the colour that
happens to lie below transparent pixels appears, and photos lie on their side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Ranges = Mapping[str, tuple[float, float]]

_ORIENTATION = 274  # tag of EXIF
_PHOTOMETRIC = 262  # tag of TIFF; 0: the smallest value is white
# Its values 2 to 8 as numbers of PIL.Image.Transpose: mirrored left to right, 180 degrees, mirrored
# top to bottom, transposed, 270 degrees, transverse, 90 degrees.
_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_DEPTHS = (8, 10, 12, 14, 16)  # bits of a sample: what cameras and scanners give


def wide_kind(mode: str) -> str | None:
    """``I`` for integers of 16 or 32 bits, ``F`` for floats, None for modes of 8 bits."""
    return mode[0] if mode[0] in "IF" else None


def channels(image: Image) -> int:
    """1 for an image that is grey by its header, also by its palette; 3 for colour."""
    if image.mode in ("1", "L", "LA", "La") or wide_kind(image.mode):
        return 1
    if image.mode not in ("P", "PA") or image.palette is None:
        return 3
    layout, entries = image.palette.getdata()
    layout, _, planar = layout.partition(";")
    table = np.frombuffer(entries, np.uint8)
    table = table.reshape(len(layout), -1).T if planar else table.reshape(-1, len(layout))
    return 1 if (table[:, :3] == table[:, :1]).all() else 3


def measure_ranges(images: Iterable[Image]) -> Ranges:
    """The range of wide values that becomes 0 to 255, by ``wide_kind``, from decoded images.

    Integers: 0 to 2^b - 1 with the smallest b of 8, 10, 12, 14 or 16 that holds them all: values of
    12 bits stored in 16 keep all of their contrast. Floats: 0 to 1 or 0 to 255 where they all lie
    in it. Else from the smallest to the largest. Tags such as TIFF's MaxSampleValue are not asked:
    they describe one file, and a level must mean the same in all of them.
    """
    seen: dict[str, tuple[float, float]] = {}
    for image in images:
        kind = wide_kind(image.mode)
        if kind is None:
            continue
        values = np.asarray(image)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = seen.get(kind, (np.inf, -np.inf))
            seen[kind] = min(low, float(values.min())), max(high, float(values.max()))
    return {kind: _nominal(kind, *extremes) for kind, extremes in seen.items()}


def _nominal(kind: str, low: float, high: float) -> tuple[float, float]:
    tops = (1.0, 255.0) if kind == "F" else tuple(2.0**bits - 1 for bits in _DEPTHS)
    top = next((top for top in tops if high <= top), None)
    if low >= 0 and top is not None:
        return 0.0, top
    return low, high if high > low else low + max(1.0, abs(low))  # 1e20 + 1 is 1e20


def to_8_bits(image: Image, channels: int, ranges: Ranges) -> Image:
    """A decoded image of mode "L" or "RGB", upright.

    Args:
        image: of any mode; in place of transparency there is white, as viewers show it.
        channels: 1 or 3 of the result.
        ranges: of ``measure_ranges``; a wide image of a kind that is missing has its own.
    """
    from PIL import Image as pillow  # the extra [data]

    # Pillow exchanges black and white in TIFFs of 1 and 8 bits only
    white_is_0 = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image = _upright(image)
    if wide_kind(image.mode):
        levels = _narrow(image, ranges)
        image = pillow.fromarray(255 - levels if white_is_0 else levels)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _upright(image: Image) -> Image:
    """The image turned as its EXIF orientation says; damaged EXIF data says nothing."""
    from PIL import Image as pillow

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # its parser raises what it likes, and the pixels are good
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(pillow.Transpose(turn))


def _narrow(image: Image, ranges: Ranges) -> NDArray[np.uint8]:
    """Wide values as 0 to 255: clipped to their range, rounded to nearest, NaN as 0."""
    kind = wide_kind(image.mode)
    assert kind is not None
    known = ranges if kind in ranges else measure_ranges([image])
    low, high = known.get(kind, (0.0, 1.0))  # without a finite value
    values = np.nan_to_num(np.asarray(image, np.float64), nan=low)  # high - low overflows fp32
    levels: NDArray[np.uint8] = np.rint(
        (values.clip(low, high) - low) * (255 / (high - low))
    ).astype(np.uint8)
    return levels
