"""loss.cu, compiled by NVRTC for every architecture with bulk copies: what came out."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.compile.harness import BLOCK_SHARED, SM_SHARED, look_at

pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed: no NVRTC")

from fastmp.backends.cuda import loss, nvrtc

pytestmark = pytest.mark.slow

ARCHITECTURES = (90, 100, 120)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {size.row_bytes: size for size in loss.RING_SIZES}


def build(name, warps, shared=0):
    def one(arch):
        image = nvrtc.compile(loss.FILE, name, f"sm_{arch}")
        return look_at(name, arch, image.code, warps, shared)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(one, ARCHITECTURES))


def build_rows(dtype, smooth, aligned, size):
    return build(loss.kernel_name(dtype, smooth, aligned, size), size.threads // 32 + 1)


# Every size, every dtype, every kind of smoothing, and gradients with other boundaries.
CASES = [
    *[(BF16, "equal", True, size) for size in SIZES],
    *[(dtype, smooth, True, 88 << 10) for dtype in (F16, F32) for smooth in ("none", "equal")],
    (BF16, "none", True, 88 << 10),
    (BF16, "none", True, 432 << 10),
    (F16, "weighted", True, 88 << 10),
    (F32, "weighted", False, 88 << 10),
    (BF16, "equal", False, 88 << 10),
    (F16, "equal", False, 18 << 10),
    (BF16, "equal", False, 432 << 10),
]


@pytest.mark.parametrize(("dtype", "smooth", "aligned", "row_bytes"), CASES)
def test_rows(dtype, smooth, aligned, row_bytes):
    size = SIZES[row_bytes]
    vector = 16 // dtype.itemsize
    for kernel in build_rows(dtype, smooth, aligned, size):
        where = f"sm_{kernel.arch}, {kernel.registers} registers"
        assert kernel.stays_in_registers(), f"{where}: spills"
        # As many blocks as the table says, by their registers: 256 of a warp at a time.
        a_warp = -(-kernel.registers // 8) * 8 * 32
        assert size.blocks * kernel.warps * a_warp <= 65536, where
        if size.threads == 512:
            assert kernel.registers <= 60, where
        assert kernel.count("UBLKCP.*") == 1
        # Chunks are read 16 bytes a thread in both passes, and so is the gradient written: in the
        # loop, in the last chunk, and as zeros.
        assert kernel.count(r"LDS\.128") >= (4 if aligned else 2) * size.each
        assert kernel.count(r"STG?\.E\..*128") == (2 * size.each + 1 if aligned else 0)
        # An exponential for each logit of both passes, and again of the chunks that are checked,
        # and a few for the row.
        logits = (4 if aligned else 3) * size.each * vector
        exponentials = kernel.count(r"MUFU\.EX2.*")
        assert logits + 2 <= exponentials <= logits + 12, where
        clusters = kernel.count("UCGABAR_.*")
        assert clusters == (4 if size.cluster > 1 else 0)
        assert overlaps(kernel) == (1, 1)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("row_bytes", SIZES)
def test_instructions_of_a_logit(dtype, row_bytes):
    """8 and 7 with smoothing, and fewer where a thread takes two vectors of a chunk."""
    size = SIZES[row_bytes]
    each, logits = size.each, 8 * size.each
    for kernel in build_rows(dtype, "equal", True, size):
        first = kernel.loop(MUFU=logits, FFMA=logits, LDS=each, ST=0)
        second = kernel.loop(MUFU=logits, FFMA=2 * logits, LDS=each, ST=each)
        most = (64, 60) if each == 1 else (54 * each, 50 * each)
        assert first <= most[0], kernel.arch
        assert second <= most[1], kernel.arch


def test_divisors():
    for kernel in build(f"fastmp::loss_divisors<{loss.DIVISOR_PARTS}>", 8):
        assert kernel.stays_in_registers()
        assert kernel.occupancy() >= 0.5
        assert overlaps(kernel) == (0, 1)


def test_the_sum_of_the_losses():
    for kernel in build(f"fastmp::loss_sum<{loss.SUM_THREADS}>", loss.SUM_THREADS // 32):
        assert kernel.stays_in_registers()
        assert overlaps(kernel) == (1, 0)


def overlaps(kernel):
    """How often it waits for the launch before it, and allows the next one to begin."""
    return kernel.count("ACQBULK"), kernel.count("PREEXIT")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_rings_fit(arch):
    for row_bytes in range(8192, 450_000, 4096):
        ring = loss.ring_for(row_bytes, SM_SHARED[arch])
        if ring is not None:
            assert ring.shared + 1280 <= BLOCK_SHARED[arch]
