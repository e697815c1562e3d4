"""The ring of csrc/cuda/loss.cu: its barriers, its sizes, and the bytes that it touches."""

import ctypes
import mmap
import os
import subprocess

import pytest
import torch

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.cuda import loss
from fastmp.ops.loss import forward_reference
from tests.kernels.shim_loss.conftest import ONE_BLOCK, TWO_BLOCKS, build, ring

BARRIERS = ["full", "empty", "block", "warp", "cluster", "launch"]
SIZES = [ONE_BLOCK, TWO_BLOCKS]


# ---- barriers ----


@pytest.fixture(scope="session")
def race(tmp_path_factory):
    return build("race.cpp", tmp_path_factory.mktemp("race") / "race", "-g", "-fsanitize=thread")


@pytest.mark.parametrize("missing", ["none", *BARRIERS])
def test_without_a_barrier_there_is_a_race_and_with_all_there_is_none(race, missing):
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [race, missing], capture_output=True, text=True, timeout=120, env=environment
    )
    if missing == "none":
        assert (done.returncode, done.stderr) == (0, "done")
    else:
        assert done.returncode != 0
        assert "WARNING: ThreadSanitizer: data race" in done.stderr


# ---- bytes ----

PAGE = mmap.PAGESIZE
NORESERVE = 0x4000  # Linux; Python's mmap does not name it
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(tensor, at_end):
    """A copy that begins, or ends, where a page does that can neither be read nor written."""
    size = tensor.numel() * tensor.element_size()
    pages = max(1, -(-size // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * PAGE):
        assert LIBC.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
    begin = (pages + 1) * PAGE - size if at_end else PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("size", SIZES, ids=["one block", "two blocks"])
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("classes", [1, 5, 8, 257, 403, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_byte_outside_the_tensors_is_touched(dtype, classes, at_end, size):
    z = torch.randn(5, classes).to(dtype)
    a, b = torch.randint(classes, (2, 5))
    a[1] = b[1] = -100
    tensors = [z, a, b, torch.rand(5), torch.rand(classes) + 0.1]
    z, a, b, lam, weight = (guarded(t, at_end) for t in tensors)
    outputs = [torch.empty(5), torch.empty(6, 2), torch.empty(5, classes, dtype=dtype)]
    outputs = [guarded(t, at_end) for t in outputs]
    spec = LossSpec(a, b, lam, weight, -100, Reduction.MEAN, 0.1)
    loss.run(z, torch.tensor(8.0), spec, *outputs, ring(size, classes * z.element_size()))
    wide = spec._replace(lam=lam.double(), weight=weight.double())
    exact = forward_reference(z.double(), torch.tensor(8.0, dtype=torch.float64), True, wide)
    torch.testing.assert_close(outputs[0].sum().double(), exact[0], rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(outputs[2].double(), exact[2], rtol=eps, atol=1e-5)


def test_rows_further_apart_than_2_31_logits():
    stride = 2**31 + 24
    memory = mmap.mmap(-1, 2 * (stride + 1000), flags=mmap.MAP_PRIVATE | NORESERVE)
    z = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 1000), (stride, 1))
    z.copy_(torch.randn(2, 1000))
    y = torch.tensor([3, 999])
    outputs = torch.empty(2), torch.empty(3, 2), torch.empty(2, 1000, dtype=z.dtype)
    spec = LossSpec(y, None, None, None, -100, Reduction.SUM, 0.0)
    loss.run(z, None, spec, *outputs, ring(ONE_BLOCK, 2000))
    exact = torch.nn.functional.cross_entropy(z.double(), y, reduction="none")
    torch.testing.assert_close(outputs[0].double(), exact, rtol=1e-6, atol=1e-6)


# ---- sizes ----

H200, RTX5090 = 228 << 10, 100 << 10  # shared memory of a multiprocessor

# The best of each row in H200, as the table above RING_SIZES has them.
MEASURED = {
    8192 * 2: (64, 1, 8),
    16384 * 2: (128, 1, 5),
    32000 * 2: (512, 1, 2),
    50257 * 2: (768, 1, 1),
    128256 * 2: (768, 2, 1),
}


@pytest.mark.parametrize("row_bytes", MEASURED)
def test_the_measured_sizes(row_bytes):
    found = loss.ring_for(row_bytes, H200)
    assert (found.size.threads, found.size.cluster, found.size.blocks) == MEASURED[row_bytes]


@pytest.mark.parametrize("shared", [H200, RTX5090])
def test_a_ring_holds_a_row_and_fits(shared):
    longest = 0
    for row_bytes in range(8192, 600_000, 1022):
        found = loss.ring_for(row_bytes, shared)
        if found is None:
            assert row_bytes > longest
            continue
        longest = row_bytes
        size = found.size
        vectors = -(-(row_bytes // 16) // size.cluster)
        assert found.slots * size.threads * size.each >= vectors
        assert size.blocks * (found.shared + 1280 + 1024) <= shared
        assert (size.threads + 32) * size.blocks <= 2048
        assert size.cluster == 1 or row_bytes > shared - 16384  # one multiprocessor is too small
    assert longest > 1.8 * shared
    for size in loss.RING_SIZES:  # others than the table's are for benchmarks.tools.tune
        assert loss.ring_of(size, 2 * shared, shared) is None
    assert loss.ring_for(2 * shared, shared) is None


@pytest.mark.parametrize("spare", [0, 1, 7, 50])
def test_the_ring_s_length_changes_no_bit(spare):
    z = torch.randn(9, 1003)
    a, b = torch.randint(1003, (2, 9))
    spec = LossSpec(a, b, torch.rand(9), None, -100, Reduction.MEAN, 0.1)
    results = []
    for chunks in (3, spare):
        outputs = torch.empty(9), torch.empty(10, 2), torch.empty(9, 1003)
        loss.run(z, None, spec, *outputs, ring(ONE_BLOCK, 4012, chunks))
        results.append(outputs)
    assert all(map(torch.equal, *results))
