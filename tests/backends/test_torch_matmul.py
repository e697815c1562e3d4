"""torch's matrix product with operands packed for AMX, forced on CPUs without."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastmp.backends import torch_matmul
from fastmp.backends.torch_matmul import TILE_K, matmul, uses_amx
from fastmp.functional import linear
from fastmp.ops.linear import backward_reference, linear_reference
from tests.functional.linear_cases import (
    LAYOUTS,
    NAN,
    check,
    lay_out,
    product,
    value_and_grads,
)

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
SIZES = [1, 2, 17, 32, 33, 100]  # below, at and above the 32 of a tile, odd and even


@contextmanager
def amx(present=True):
    with mock.patch.object(torch_matmul, "uses_amx", return_value=present):
        yield


class Products(TorchDispatchMode):
    """Notes the operands of every product that torch computes."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.operands.append(args[-2:])
        return func(*args, **(kwargs or {}))


def operands(m, k, n, dtype):
    """(m, k), (k, n) and (n) random numbers, the same at every call."""
    torch.manual_seed(m * k + n)
    return (torch.randn(shape).to(dtype) for shape in ((m, k), (k, n), (n,)))


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_packed_operands_are_dense_and_end_with_a_tile(dtype, k):
    a, b, bias = operands(17, k, 35, dtype)
    for of_a in LAYOUTS:
        for of_b in LAYOUTS:
            with amx(), Products() as products:
                out = matmul(lay_out(a, of_a), lay_out(b, of_b), bias)
            ((left, right),) = products.operands
            assert left.shape[1] == right.shape[0] == -(-k // TILE_K) * TILE_K
            for operand in (left, right):
                assert operand.is_contiguous() or operand.t().is_contiguous()
                assert operand.isfinite().all()
            assert out.isfinite().all()


@pytest.mark.parametrize("k", [*SIZES, 1023, 4100])
@pytest.mark.parametrize("bias", [True, False])
def test_packing_changes_no_bit(bias, k):
    """Zeros add nothing. In fp16 MKL, whose order of sums depends on K, multiplies without AMX."""
    for m in (1, 3, 64):
        for n in (1, 35, 128):
            a, b, c = operands(m, k, n, torch.bfloat16)
            for left in (a, a.t().contiguous().t()):
                for right in (b, b.t().contiguous().t()):
                    expected = F.linear(left, right.t(), c if bias else None)
                    for present in (False, True):
                        with amx(present):
                            out = matmul(left, right, c if bias else None)
                        assert torch.equal(out, expected)


def test_operands_that_need_no_packing_are_not_copied():
    a, b, _ = operands(17, 64, 35, torch.bfloat16)
    transposed = b.t().contiguous().t()
    with amx(), Products() as products:
        matmul(a, b)
        matmul(a, transposed)
    pointers = [[t.data_ptr() for t in pair] for pair in products.operands]
    assert pointers == [[t.data_ptr() for t in pair] for pair in ((a, b), (a, transposed))]


def test_amx_is_detected_for_16_bits():
    uses_amx.cache_clear()
    for tile, fp16 in [(False, False), (True, False), (True, True)]:
        with (
            mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=tile),
            mock.patch.object(torch.cpu, "_is_amx_fp16_supported", return_value=fp16),
        ):
            assert (uses_amx(torch.bfloat16), uses_amx(torch.float16)) == (tile, fp16)
            assert not uses_amx(torch.float32)
            assert not uses_amx(torch.float64)
        uses_amx.cache_clear()


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_linear_layer_on_packed_operands(dtype, layout, activation):
    """Values and gradients with NaN around the operands, and the operands of all three products."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(s).to(dtype) for s in ((3, 13, 37), (35, 37), (35,)))
    grad = torch.randn(3, 13, 35).to(dtype)
    x, w, grad = (lay_out(t, layout) for t in (x, w, grad))
    with amx():
        check(x, w, b, grad, activation, own=False)
        with Products() as products:
            y, z = linear_reference(x, w, b, activation, True)
            saved = y if activation == "relu" else z
            backward_reference(grad, saved, x, w, activation, [True] * 3)
    assert [left.shape[1] for left, _ in products.operands] == [64, 64, 64]


@pytest.mark.usefixtures("every_size")
def test_nan_outside_the_operands_stays_there():
    """A batch in the columns 1 to 19 of a wider matrix, whose other columns are NaN."""
    wide = torch.full((31, 40), NAN, dtype=torch.bfloat16)
    wide[:, 1:20] = torch.randn(31, 19)
    w, grad = torch.randn(35, 19).bfloat16(), torch.randn(31, 35).bfloat16()
    results = []
    for x in (wide[:, 1:20], wide[:, 1:20].clone()):
        with amx(), product(False):
            results.append(value_and_grads(linear, (x, w), grad))
    assert all(t.isfinite().all() for t in results[0])
    assert all(map(torch.equal, *results))
