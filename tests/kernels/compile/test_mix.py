"""Machine code of mix: accesses of 16 bytes where the shape allows, and few instructions."""

import re
from collections import Counter

import pytest
import torch

pytestmark = pytest.mark.slow

U8, F16, BF16, F32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
KINDS = ["mixup", "cutmix", "plain"]


def launch(shape, kind, input, dtype, normalise, shifted=0, device="cpu"):
    from fastmp.backends.triton.kernels.mix import mix

    n, channels, height, width = shape
    memory = torch.zeros(n * channels * height * width + shifted, dtype=input, device=device)
    index = None if kind == "plain" else torch.zeros(n, dtype=torch.int64)
    lam = torch.zeros(n) if kind == "mixup" else None
    box = torch.zeros(n, 4, dtype=torch.int64) if kind == "cutmix" else None
    scale = torch.ones(channels) if normalise else None
    mix(memory[shifted:].view(shape), lam, index, box, scale, scale, dtype)


def accesses(kernel, name):
    """How many there are of how many bits."""
    found = Counter()
    for instruction, count in kernel.instructions.items():
        if instruction.startswith(name):
            bits = re.search(r"\.[US]?(8|16|64|128)\b", instruction)
            found[int(bits[1]) if bits else 32] += count
    return found


# Input, output, normalised; elements of a thread and of an access, of which the wider is 16 bytes.
LARGE = {
    "u8-f16": (U8, F16, True, 32, 8),
    "u8-f32": (U8, F32, True, 32, 4),
    "f16-f16": (F16, F16, False, 32, 8),
    "bf16-bf16": (BF16, BF16, True, 32, 8),
    "f32-f16": (F32, F16, True, 16, 4),
    "f32-f32": (F32, F32, False, 16, 4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LARGE)
def test_large_images(compiled, case, kind):
    """Nothing is narrower than meant, and memory is the limit.

    An H200 moves 4.8 TB/s / 132 / 1.755 GHz = 20.7 bytes a cycle on each multiprocessor, which
    issues 128 lanes' instructions in it: 6.2 for each byte.
    """
    input, dtype, normalise, elements, vector = LARGE[case]
    images = 1 if kind == "plain" else 2
    loads = Counter({8 * input.itemsize * vector: images * elements // vector})
    loads[64] += images - 1  # the index
    loads[32] += {"mixup": 1, "cutmix": 4, "plain": 0}[kind] + 2 * normalise
    for kernel in compiled(launch, (2, 3, 224, 224), kind, input, dtype, normalise):
        assert accesses(kernel, "LDG") == loads
        assert accesses(kernel, "STG") == {8 * dtype.itemsize * vector: elements // vector}
        assert kernel.occupancy() >= 0.5
        instructions = sum(kernel.instructions.values()) - kernel.count("NOP")
        assert instructions / elements <= 6.2 * (input.itemsize + dtype.itemsize)


# Shape, kind, dtypes, first element; bits of each load of pixels and of each store.
NARROW = {
    "width of 28": ((4, 3, 28, 28), "cutmix", U8, F16, 0, 32, 64),
    "9x9": ((4, 3, 9, 9), "mixup", U8, F16, 0, 8, 16),
    "299x299": ((2, 3, 299, 299), "cutmix", F16, F16, 0, 16, 16),
    "1x1": ((4, 3, 1, 1), "cutmix", F16, F32, 0, 16, 32),
    "shifted": ((4, 3, 32, 32), "mixup", U8, F16, 1, 8, 128),
}


@pytest.mark.parametrize("case", NARROW)
def test_other_images(compiled, case):
    *arguments, shifted, load, store = NARROW[case]
    lookups = {64, 32}
    for kernel in compiled(launch, *arguments, True, shifted):
        assert accesses(kernel, "LDG").keys() - lookups == {load} - lookups
        assert accesses(kernel, "STG").keys() == {store}


def test_more_than_2_31_pixels(compiled):
    """The accesses are as wide as those of small batches."""
    shape = (2, 3, 2**16, 2**15)
    for kernel in compiled(launch, shape, "mixup", U8, F16, True, 0, "meta"):
        assert accesses(kernel, "STG") == {128: 4}
