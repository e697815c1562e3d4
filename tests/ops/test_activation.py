"""The activations of fastmp.functional.linear alone: its product is one by a weight of 1."""

import pytest
import torch

from fastmp.backends.cpu.linear import activate, activation_backward
from fastmp.functional import linear
from fastmp.ops.linear import ACTIVATIONS
from tests.functional.linear_cases import (
    DTYPES,
    NAN,
    NATIVE,
    SMOOTH,
    exact,
    half_ulp,
    product,
    torch_linear,
    value_and_grads,
)
from tests.native import needs_native

pytestmark = pytest.mark.usefixtures("every_size")

INF = float("inf")


def alone(fn, z, activation):
    """Value and derivative; grad_output and the weight are 1."""
    one = torch.ones(1, 1, dtype=z.dtype)
    y, dz, _ = value_and_grads(lambda x, w: fn(x, w, None, activation), (z, one), one.expand_as(z))
    return y, dz


def assert_accurate(z, activation):
    """Half an ulp of rounding and a few of fp32, everywhere; where it matters, torch's budget."""
    ours = alone(linear, z, activation)
    theirs = alone(torch_linear, z, activation)
    refs = exact(z.double(), activation)
    usual = z.abs() <= 8
    for out, their, ref, of_fp32 in zip(ours, theirs, refs[:2], refs[2:], strict=True):
        error, torch_error = ((t.double() - ref).abs() for t in (out, their))
        limit = of_fp32 + half_ulp(ref, z.dtype)
        if NATIVE:  # torch's own is far off where 1 - erf and 1 - tanh cancel
            i = (error / limit).argmax()
            assert (error <= limit).all(), f"{error.flatten()[i]} off at {z.flatten()[i]}"
        worst, allowed = (t[usual].max() for t in (error, torch_error))
        assert worst <= 2 * allowed, f"{worst / allowed} times torch's error"


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_all_fp16_and_bf16_values(activation, own):
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        ordinary = (z.abs() >= 1.2e-38) & (z.abs() < 1e18)  # bf16 subnormals count as 0
        z = z[ordinary | (z == 0)][:, None]
        assert len(z) > 45_000
        with product(own):
            assert_accurate(z, activation)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_fp32_values(activation, own):
    wide = torch.logspace(-37, 18, 2**17, dtype=torch.float64)
    middle = torch.logspace(-4, 2.3, 2**18, dtype=torch.float64)
    positive = torch.cat([wide, middle, torch.tensor([0.0])]).float()
    z = torch.cat([-positive, positive])[:, None]
    with product(own):
        assert_accurate(z, activation)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_the_ends(activation, dtype, own):
    """Where torch is finite its values; NaN for NaN; -inf times 0 is NaN, as in torch.

    Two differences, both to the better: gelu(inf) is inf (torch in fp32: NaN), and the derivatives
    at ±inf are their limits (torch: NaN).
    """
    big = torch.finfo(dtype).max
    z = torch.tensor([NAN, -INF, INF, -big, big, -3e4, 3e4, -300, 300, 0.0]).to(dtype)
    z = z.repeat(5)[:, None]  # whole vectors and the rest
    with product(own):
        y, dz = alone(linear, z, activation)
    ref, ref_dz = alone(torch_linear, z, activation)
    for out, theirs in ((y, ref), (dz, ref_dz)):
        finite = theirs.isfinite()
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(out[finite], theirs[finite], rtol=ulp, atol=1e-37)
    y, dz = y.view(5, 10), dz.view(5, 10)
    smooth = activation in SMOOTH
    assert y[:, 0].isnan().all()
    assert (dz[:, 0].isnan() == smooth).all()
    assert (y[:, 1].isnan() == smooth).all()
    if NATIVE:
        assert (y[:, 2] == INF).all()
        assert ((dz[:, 1].double() - float(activation == "none")).abs() < 1e-37).all()
        assert (dz[:, 2] == 1).all()


def bits(t):
    """As integers; 0 for every NaN."""
    return torch.where(t.isnan(), 0, t.view(torch.int16))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", SMOOTH)
def test_looked_up_and_computed_are_the_same_bits(activation, dtype):
    """A large call looks values and derivatives up, one of 2,048 elements computes them."""
    z = torch.arange(-(2**15), 2**15 + 5).to(torch.int16).view(dtype)  # all, and a tail of 5
    grad = torch.linspace(-3, 5, len(z)).to(dtype)

    def value(z, grad):
        return activate(z.clone(), activation, in_place=True)

    def gradient(z, grad):
        return activation_backward(grad[None], z[None], activation, False, False)[0][0]

    for call in (value, gradient):
        parts = [call(*part) for part in zip(z.split(2048), grad.split(2048), strict=True)]
        assert torch.equal(bits(call(z, grad)), bits(torch.cat(parts)))
    assert torch.equal(bits(activate(z, activation, in_place=False)), bits(value(z, grad)))
