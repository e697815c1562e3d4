"""orthogonalize_ against the iteration in fp64 on singular values, and against torch's."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from fastmp.ops.orthogonalize import _segments, orthogonalize_
from fastmp.optim.muon import COEFFICIENTS

SHAPES = [(48, 48), (32, 48), (48, 32), (32, 96), (160, 32), (24, 216), (1, 7), (1, 1)]


def exact(x, steps=5, eps=1e-7):
    """The polynomial, applied to the singular values of fp64 matrices."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=eps)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ v


def random(*shape, decay=1.0):
    """Normal matrices whose singular values are made to fall to ``decay`` of the first."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if decay == 1.0:
        return x
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * torch.logspace(0, decay, s.shape[-1], 10.0)) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 7])
def test_fp64_is_the_polynomial_of_the_singular_values(shape, steps):
    x = random(3, *shape).double()
    found = orthogonalize_(x.clone(), COEFFICIENTS, steps, 1e-7, scale=0.3)
    torch.testing.assert_close(found, 0.3 * exact(x, steps), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES[:6])
@pytest.mark.parametrize("decay", [1.0, -2.0, -3.0])
def test_bf16_is_as_near_as_torchs(shape, decay):
    """To 3 times torch's error, and 4% of the norm. Singular values end where the polynomial of
    those above 0.02 ends, in [0.68, 1.21], and below that where fp64 has them."""
    x = random(4, *shape, decay=decay).bfloat16()
    expected = exact(x)
    found = orthogonalize_(x.clone(), COEFFICIENTS, 5, 1e-7).double()
    torchs = torch.stack([_zeropower_via_newtonschulz(m, COEFFICIENTS, 5, 1e-7) for m in x])
    error, theirs = (found - expected).norm(), (torchs.double() - expected).norm()
    assert error <= 3 * theirs + 0.04 * expected.norm()
    values, right = torch.linalg.svdvals(found), torch.linalg.svdvals(expected)
    assert (values - right).abs().max() < 0.12
    assert values.max() < 1.3


def test_tiny_and_zero_matrices():
    """Below eps a matrix is divided by eps; one of zeros stays."""
    x = torch.zeros(3, 8, 8, dtype=torch.bfloat16)
    x[1] = 1e-20
    x[2] = torch.eye(8) * 1e15
    found = orthogonalize_(x.clone(), COEFFICIENTS, 5, 1e-7)
    assert not found[0].any()
    torch.testing.assert_close(found[1].double(), exact(x[1:2])[0], rtol=0.05, atol=1e-20)
    torch.testing.assert_close(found[2].double(), exact(x[2:])[0], rtol=0.05, atol=1e-3)


def test_a_batch_is_its_matrices_and_threads_change_nothing():
    x = random(5, 64, 192).bfloat16()
    whole = orthogonalize_(x.clone(), COEFFICIENTS, 5, 1e-7)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    again = orthogonalize_(x.clone(), COEFFICIENTS, 5, 1e-7)
    torch.set_num_threads(before)
    assert torch.equal(whole, again)
    assert orthogonalize_(torch.empty(0, 3, 4), COEFFICIENTS, 5, 1e-7).numel() == 0


def test_segments_restart_after_three_steps_and_every_two():
    assert [_segments(n) for n in (1, 3, 4, 5, 8)] == [[1], [3], [3, 1], [3, 2], [3, 2, 2, 1]]
