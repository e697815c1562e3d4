"""The grouped products of Muon's iteration, in the interpreter or on a GPU."""

import pytest
import torch

from fastmp import optim
from fastmp.backends import registry
from fastmp.backends.newton_schulz import Batch
from fastmp.backends.triton import orthogonalize
from fastmp.backends.triton.orthogonalize import GroupedIteration
from fastmp.backends.triton.tiles import ProductTile
from fastmp.ops.orthogonalize import instructions, orthogonalize_
from tests.kernels.interpret.conftest import DEVICE
from tests.ops.test_orthogonalize import COEFFICIENTS, exact, random
from tests.optim.optim_cases import give_gradients, parameters

# On X itself and on G, wide and tall, with pads, of one tile and of several.
SHAPES = [(1, 40, 40), (1, 40, 88), (1, 83, 35), (1, 1, 7), (2, 0, 3)]


def grouped(*, steps=5, shapes=SHAPES):
    batches = [
        Batch(*shape, 0.3, 1e-7, instructions(*shape[1:], COEFFICIENTS, steps)) for shape in shapes
    ]
    return GroupedIteration(batches, torch.device(DEVICE))


def results(iteration, matrices):
    for source, x in zip(iteration.sources, matrices, strict=True):
        source.copy_(x)
    iteration.run()
    return [result.cpu() for result in iteration.results]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of matrices that an interpreter can multiply."""
    if DEVICE == "cpu":
        monkeypatch.setattr(orthogonalize, "product_tile", lambda *_: ProductTile(32, 32, 32, 4, 2))


@pytest.mark.parametrize(("steps", "size"), [(1, 1e-9), (5, 1e9)])
def test_values_of_many_shapes_at_once(steps, size):
    """As near to the polynomial of the singular values as a batch alone with torch's products."""
    iteration = grouped(steps=steps)
    matrices = [size * random(*shape, decay=-1.0).bfloat16() for shape in SHAPES]
    for found, x in zip(results(iteration, matrices), matrices, strict=True):
        expected = 0.3 * exact(x, steps)
        alone = orthogonalize_(x.clone(), COEFFICIENTS, steps, 1e-7, 0.3)
        error, other = ((y - expected).norm() for y in (found, alone))
        assert error <= 1.5 * other + 0.01 * expected.norm()


def test_memory_of_the_last_run_does_not_matter(monkeypatch):
    """Nor whether all matrices fit into the memory at once: then some go after the others."""
    shapes = [(2, 40, 88)]
    x = random(*shapes[0]).bfloat16()
    iteration = grouped(steps=2, shapes=shapes)
    (first,) = results(iteration, [x])
    results(iteration, [x + 1])
    assert torch.equal(results(iteration, [x])[0], first)
    monkeypatch.setattr(orthogonalize, "_MAX_SQUARES", 4 * 40**2)
    apart = grouped(steps=2, shapes=shapes)
    assert len(apart.launches) == 2 * len(iteration.launches)
    assert torch.equal(results(apart, [x])[0], first)


def test_factors_are_fp32_whatever_the_default_dtype():
    shapes = [(1, 40, 24)]
    x = random(*shapes[0]).bfloat16()
    (expected,) = results(grouped(steps=1, shapes=shapes), [x])
    torch.set_default_dtype(torch.bfloat16)
    try:
        iteration = grouped(steps=1, shapes=shapes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(results(iteration, [x])[0], expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the overflow
def test_zeros_stay_and_norms_that_overflow_give_zeros():
    shapes = [(3, 40, 24)]
    x = torch.zeros(shapes[0])
    x[1] = 1e30
    x[2] = torch.eye(40)[:, :24]
    (found,) = results(grouped(shapes=shapes), [x])
    assert not found[:2].any()
    torch.testing.assert_close(found[2:].double(), 0.3 * exact(x[2:]), rtol=0.02, atol=1e-3)


def test_a_step_of_muon_applies_the_results(monkeypatch):
    """Sources and results are other memory for square matrices, and apart for padded ones."""
    shapes = [(40, 40), (17, 30)]
    alone, ours = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    start = [p.detach().clone() for p in alone]
    ours = [p.detach().to(DEVICE).requires_grad_() for p in ours]
    give_gradients(alone)
    for p, q in zip(ours, alone, strict=True):
        p.grad = q.grad.to(DEVICE)
    optim.Muon(alone, lr=0.1).step()
    kernel = registry._Kernel("cpu", GroupedIteration, lambda *_: None, "")
    monkeypatch.setitem(registry._kernels, ("orthogonalize_batches", "cpu"), kernel)
    optim.Muon(ours, lr=0.1).step()
    for p, q, s in zip(ours, alone, start, strict=True):
        assert (p.detach().cpu() - q).norm() <= 0.03 * (q - s).norm()
