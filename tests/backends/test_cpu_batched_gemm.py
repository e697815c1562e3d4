"""The batched product of the native library: values, symmetry, threads, refused arguments."""

import ctypes

import pytest
import torch

from fastmp.backends import cpu
from fastmp.backends.cpu.orthogonalize import product
from fastmp.backends.cpu.structs import BatchedGemmArgs, Status
from tests.native import needs_native

pytestmark = needs_native
# around the tiles of 14 x 32, and more steps than one block of k has
SHAPES = [
    (1, 1, 1),
    (14, 32, 5),
    (15, 33, 2),
    (29, 70, 64),
    (3, 100, 7),
    (100, 3, 40),
    (16, 16, 4500),
]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def check(found, a, b, c=None, beta=0.0, alpha=1.0):
    """One rounding to bf16 away from fp64."""
    exact = alpha * (a.double() @ b.double()) + (0 if c is None else beta * c.double())
    size = abs(alpha) * (a.double().abs() @ b.double().abs()) + 1
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-5).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_values_of_every_layout(m, n, k, batch):
    c = random(batch, m, n)
    for a in (random(batch, m, k), random(batch, k, m).mT):
        for b in (random(batch, k, n), random(batch, n, k).mT):
            out = torch.full((batch, m, n), torch.nan).bfloat16()
            check(product(a, b, out=out), a, b)
            check(product(a, b, c, 2.5, -0.5, out=out), a, b, c, 2.5, -0.5)


@pytest.mark.parametrize("n", [1, 13, 14, 15, 31, 33, 48, 97])
@pytest.mark.parametrize("k", [3, 150, 2100])
def test_half_of_a_symmetric_product_is_the_whole(n, k):
    x = random(3, n, k)
    g = product(x, x.mT, out=torch.full((3, n, n), torch.nan).bfloat16(), symmetric=True)
    check(g, x, x.mT)
    assert torch.equal(g, g.mT)
    squares = product(g, g, g, -2.0, 0.25, out=torch.empty_like(g), symmetric=True)
    check(squares, g, g, g, -2.0, 0.25)
    assert torch.equal(squares, squares.mT)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_batch_and_threads_change_no_bit(batch, symmetric):
    x = random(batch, 150, 200)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(x, x.mT, out=x.new_empty(batch, 150, 150), symmetric=symmetric))
    torch.set_num_threads(before)
    alone = product(x[:1], x[:1].mT, out=x.new_empty(1, 150, 150), symmetric=symmetric)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][:1], alone)


def test_impossible_arguments_are_refused():
    x = random(2, 8, 8)
    out = torch.empty_like(x)
    right = {"a": x.data_ptr(), "b": x.data_ptr(), "out": out.data_ptr()}
    right |= {"a_batch": 64, "a_stride": 8, "a_k_stride": 1, "b_batch": 64, "b_stride": 1}
    right |= {"b_k_stride": 8, "batch": 2, "m": 8, "n": 8, "k": 8, "alpha": 1.0, "threads": 1}
    library = cpu.load()[0]
    wrong = [{"threads": 0}, {"m": -1}, {"a": None}, {"out": 1}, {"a_stride": 2, "a_k_stride": 2}]
    wrong += [{"symmetric": 1, "m": 7}, {"k": 0}, {"batch": 1 << 62}, {"b_stride": 1 << 60}]
    for change in ({}, *wrong):
        args = BatchedGemmArgs(**{**right, **change}, size=ctypes.sizeof(BatchedGemmArgs))
        status = library.fastmp_batched_gemm(ctypes.byref(args))
        assert status == (Status.BAD_ARGUMENT if change else Status.OK), change
