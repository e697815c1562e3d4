"""Images and folders of them for the tests of this folder."""

from __future__ import annotations

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: no image files")


def picture(seed, size=(24, 16), mode="RGB"):
    """Random pixels, so that no two crops are equal."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder, parts, per_class=4, **options):
    for number, (part, name) in enumerate((p, c) for p in parts for c in ("cat", "dog")):
        target = folder / part / name
        target.mkdir(parents=True)
        for i in range(per_class):
            picture(100 * number + i, **options).save(target / f"{i:03}.png")
    return folder
