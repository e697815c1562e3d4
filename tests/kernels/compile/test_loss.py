"""The loss kernels on every architecture: vector accesses, one exponential a logit, no spills."""

import pytest
import torch

from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.triton.tiles import loss_tile

pytestmark = pytest.mark.slow

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# One for each tile: rows of a thread, one to sixteen warps, blocks; and odd ones with edges.
CLASSES = [10, 32, 100, 512, 1000, 1001, 2048, 4096, 8192, 16384, 32000, 50257, 128256]


def forward(
    classes,
    dtype,
    weighted=False,
    reduction=Reduction.MEAN,
    pair=True,
    offset=0,
    stride=None,
    rows=64,
):
    """Launches what a training step does; the memory is never touched."""
    from fastmp.backends.triton.kernels import loss

    stride = stride or classes
    logits = torch.empty(rows * stride + offset, dtype=dtype)[offset:]
    logits = logits.view(rows, stride)[:, :classes]
    target = torch.zeros(rows, dtype=torch.int64)
    weight = torch.ones(classes, dtype=dtype) if weighted else None
    b, lam = (target, torch.zeros(rows)) if pair else (None, None)
    spec = LossSpec(target, b, lam, weight, -100, reduction, 0.1)
    loss.forward(logits, torch.ones(()), True, spec)


def ensure_grad(classes, dtype):
    from fastmp.backends.triton.kernels import loss

    logits = torch.empty(64, classes, dtype=dtype)
    target = torch.zeros(64, dtype=torch.int64)
    one = torch.ones(())
    spec = LossSpec(target, target, one, None, -100, Reduction.MEAN, 0.1)
    loss.ensure_grad(logits, one, one, logits, torch.ones(64, 2), spec)


def columns(width, dtype):
    from fastmp.backends.triton.kernels import loss_columns

    logits, target = torch.empty(64, width, dtype=dtype), torch.zeros(64, dtype=torch.int64)
    loss_columns.columns(logits, torch.empty(64, 5), 4096, target, target, None, -100)


def scale(source, dtype):
    from fastmp.backends.triton.kernels import loss_scale

    values = torch.empty(64, 1024, dtype=source)
    loss_scale.scale(values.to(dtype), values, torch.ones(()))


def main_kernels(kernels):
    return [kernel for kernel in kernels if kernel.name.startswith("forward")]


def accesses(kernel, width):
    loads = kernel.count(rf"LDG\.E(\.\w+)*\.{width}|LDGSTS\.E(\.\w+)*\.{width}")
    return loads, kernel.count(rf"STG\.E(\.\w+)*\.{width}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("classes", CLASSES)
def test_tiles(compiled, classes, dtype):
    tile = loss_tile(classes)
    for kernel in main_kernels(compiled(forward, classes, dtype)):
        assert kernel.warps == tile.warps
        if classes < 256:
            continue  # rows of 10 and 100 logits start where they like
        lanes = kernel.warps * 32
        each = tile.block * dtype.itemsize // 16 // lanes  # accesses of 16 bytes in a thread
        loads, stores = accesses(kernel, 128)
        ahead = tile.on_chip and dtype.itemsize == 2  # the first row's are before the loop
        assert loads >= each * (2 if ahead else 1)
        assert stores == each * (2 if tile.on_chip else 1)  # gradients or, of ignored rows, zeros


@pytest.mark.parametrize("classes", [10, 1001, 32000])
def test_class_weights(compiled, classes):
    compiled(forward, classes, torch.float16, True)


@pytest.mark.parametrize("classes", [10, 1000, 50257])
def test_ensure_grad(compiled, classes):
    compiled(ensure_grad, classes, torch.float16)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_one_row(compiled, classes):
    """Triton turns arguments that are 1 into constants, with other types than a tensor's."""
    compiled(forward, classes, torch.float32, False, Reduction.MEAN, True, 0, None, 1)


def test_a_single_target(compiled):
    for kernel in main_kernels(compiled(forward, 1000, torch.float16, False, Reduction.SUM, False)):
        assert accesses(kernel, 128) == (8, 8)


@pytest.mark.parametrize(("offset", "stride"), [(1, 1000), (0, 1001)])
def test_rows_that_are_aligned_nowhere_are_not_read_as_if_they_were(compiled, offset, stride):
    arguments = (forward, 1000, torch.float16, False, Reduction.MEAN, True, offset, stride)
    for kernel in main_kernels(compiled(*arguments)):
        assert accesses(kernel, 128) == (0, 0)


def test_one_exponential_a_logit_where_the_row_is_kept(compiled):
    for kernel in main_kernels(compiled(forward, 4096, torch.float16)):
        assert kernel.count(r"MUFU\.EX2") <= 32 + 6  # 32 logits a thread, a few for the row


@pytest.mark.parametrize(("width", "vectors"), [(8016, 2), (8017, 0)])
def test_columns(compiled, width, vectors):
    for kernel in compiled(columns, width, torch.bfloat16):
        assert accesses(kernel, 128) == (vectors, vectors)


def test_launches_overlap_where_devices_can(compiled):
    for launch in (forward, ensure_grad):
        for kernel in compiled(launch, 1000, torch.bfloat16):
            assert kernel.early == (kernel.arch >= 90)
            lets_next_begin = kernel.early and kernel.name != "finish_kernel"
            assert kernel.count("PREEXIT") == lets_next_begin


@pytest.mark.parametrize(("source", "loads"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_scale(compiled, source, loads):
    for kernel in compiled(scale, source, torch.bfloat16):
        assert accesses(kernel, 128) == (loads, 2)
