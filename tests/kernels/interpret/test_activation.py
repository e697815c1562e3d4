"""The activations of the Triton kernels on every 16-bit number: forward and derivative."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.tools.fit_activation import AIMS, fit
from fastmp.backends.abi import ACTIVATION_CODES
from fastmp.backends.triton.kernels.activation import activate, activation_backward
from fastmp.ops.linear import activate as torch_activate
from fastmp.ops.linear import activation_gradient
from tests.functional.linear_cases import SMOOTH, exact, half_ulp
from tests.kernels.interpret.conftest import DEVICE

HALVES = [torch.float16, torch.bfloat16]
#: The errors that gelu's polynomials leave, relative to the tail and the floor of ``AIMS``.
GELU_VALUE = {torch.bfloat16: 1.69e-3, torch.float16: 6.2e-5}
GELU_SLOPE = {torch.bfloat16: 1.77e-3, torch.float16: 1.0e-4}


@triton.jit
def _values(z, y, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_z = tl.load(z + offs).to(tl.float32)
    b_y = activate(b_z, ACTIVATION, y.dtype.element_ty)
    tl.store(y + offs, b_y.to(y.dtype.element_ty))


def every_number(dtype):
    z = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)
    return torch.where(z.isfinite() & (z.float().abs() < 1e18), z, 0)


def of_gelu(z, scale, error, dtype):
    """What the polynomials may add to half an ulp; past the fitted range less than the number."""
    _, limit, floor = AIMS[dtype]
    return torch.where(z.abs() <= limit, error * (scale + floor), scale)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", SMOOTH)
def test_every_number(activation, dtype):
    z = every_number(dtype)
    y = torch.empty_like(z)
    _values[(8,)](z, y, ACTIVATION=ACTIVATION_CODES[activation], BLOCK=8192)
    square = z.view(256, 256)
    dz, _ = activation_backward(torch.ones_like(square), square, activation, False)
    value, slope, of_value, of_slope = exact(z.double(), activation)
    if activation == "gelu":
        share = torch.special.ndtr(z.double())
        of_value = of_value + of_gelu(z, value.abs(), GELU_VALUE[dtype], dtype)
        of_slope = of_slope + of_gelu(z, share + (slope - share).abs(), GELU_SLOPE[dtype], dtype)
    torchs = torch_activate(z, activation), activation_gradient(torch.ones_like(z), z, activation)
    outs = (y, dz.flatten())
    bounds = (of_value, of_slope)
    for out, ref, bound, theirs in zip(outs, (value, slope), bounds, torchs, strict=True):
        error, torch_error = ((t.double() - ref).abs() for t in (out, theirs))
        limit = bound + half_ulp(ref, dtype)
        worst = (error / limit).argmax()
        assert (error <= limit).all(), f"{error[worst]} off at {z[worst]}, allowed {limit[worst]}"
        assert error.max() <= 2 * torch_error.max()
        usual = (z.abs() < 8) & (z < 0)  # where values are small the budget is one of its own
        assert error[usual].max() <= 2 * torch_error[usual].max()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_errors_of_the_fit(dtype):
    found = fit(AIMS[dtype])
    assert GELU_VALUE[dtype] / 1.05 <= found.p_error <= GELU_VALUE[dtype]
    assert GELU_SLOPE[dtype] / 1.05 <= found.r_error <= GELU_SLOPE[dtype]
