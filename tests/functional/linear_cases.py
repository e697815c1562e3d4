"""Problems for the linear layer, its definition on torch's functions, and the error it may have."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastmp.backends import cpu
from fastmp.backends.cpu import gemm_choice
from fastmp.functional import linear
from fastmp.ops.linear import ACTIVATIONS, activate, backward_reference, linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = cpu.load()[0] is not None
SMOOTH = ["gelu", "gelu_tanh", "silu"]
FP32 = torch.finfo(torch.float32).eps
NAN = float("nan")

_fixed = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=_fixed) for shape in ((3, 5, 7), (4, 7), (4,)))


@contextmanager
def product(own):
    """The library's matrix product, or torch's followed by the library's passes, on any CPU."""
    with mock.patch.object(gemm_choice, "prefers_own", return_value=own):
        yield


def torch_linear(x, w, b=None, activation="none"):
    return activate(F.linear(x, w, b), activation)


def in_torch(x, w, b, grad, activation):
    """y, dx, dW and db by torch's functions; NaN that lies between sliced rows stays there."""
    y, z = linear_reference(x, w, b, activation, True)
    saved = y if activation == "relu" else z
    return y, *backward_reference(grad, saved, x, w, activation, [True] * 3)


def value_and_grads(fn, tensors, grad):
    """fn of the tensors, and the gradient of each that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return y.detach(), *grads


def exact(z, activation):
    """Value and derivative in fp64, without cancellation, and how far fp32 may be off each."""
    one = torch.ones_like(z)
    if activation in ("none", "relu"):
        value, slope = (z, one) if activation == "none" else (z.clamp(min=0), (z > 0).double())
        return value, slope, 0 * z, 0 * z
    if activation == "gelu":
        exponent = z * z / 2
        share = torch.special.erfc(z * -(0.5**0.5)) / 2
        rest = z * (-exponent).exp() / (2 * torch.pi) ** 0.5
    else:
        factor = 2 * (2 / torch.pi) ** 0.5
        cubic = activation == "gelu_tanh"
        scale = factor * (z + 0.044715 * z**3) if cubic else z
        slope = factor * (1 + 3 * 0.044715 * z**2) if cubic else one
        exponent, share = scale.abs(), torch.sigmoid(scale)
        bell = share * torch.sigmoid(-scale)
        rest = torch.where(bell > 0, z * slope * bell, 0.0)
    # Some ulp, and what the exponential makes of the rounding of its argument.
    unit = (5 + 2 * exponent.clamp(max=90)) * FP32
    tiny = 1e-36  # below, exponentials may be 0
    of_value, of_slope = unit * (z * share).abs() + tiny, unit * (share + rest.abs()) + tiny
    return z * share, share + rest, of_value, of_slope


def half_ulp(value, dtype):
    """What one rounding to dtype changes, at most."""
    tiny = 2.0**-25 if dtype == torch.float16 else 1e-35
    return torch.finfo(dtype).eps / 2 * value.abs() + tiny


def bounds(x, w, b, grad, activation, one_rounding):
    """The largest error of each element of y, dx, dW and db: fp32 sums, rounded to dtype.

    one_rounding: bias and activation are applied to the fp32 sums; otherwise to their rounding.
    """
    dtype = x.dtype
    x, w, grad = x.double(), w.double(), grad.double()
    z = F.linear(x, w, None if b is None else b.double())
    of_sum = 2 * FP32 * F.linear(x.abs(), w.abs(), None if b is None else b.double().abs())
    of_z = of_sum + half_ulp(z, dtype)
    smooth = activation in SMOOTH
    y = activate(z, activation)
    of_act = 4 * FP32 * z.abs() if smooth else 0.0
    of_y = 1.13 * (of_sum if one_rounding else of_z) + of_act + half_ulp(y, dtype)
    leaf = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(activate(leaf, activation), leaf, grad)
    of_dz = half_ulp(dz, dtype)
    if smooth:  # the second derivatives are at most 0.8
        of_dz += grad.abs() * (0.8 * of_z + 4 * FP32)
    elif activation == "relu":  # z on the wrong side of 0
        of_dz += grad.abs() * (z.abs() <= of_z)
    rows, dz_rows, of_rows = (t[None].flatten(0, -2) for t in (x, dz, of_dz))
    of_dx = F.linear(of_dz + 2 * FP32 * dz.abs(), w.abs().t()) + half_ulp(dz @ w, dtype)
    of_terms = of_rows + 2 * FP32 * dz_rows.abs()
    of_dw = of_terms.t() @ rows.abs() + half_ulp(dz_rows.t() @ rows, dtype)
    of_db = of_terms.sum(0) + half_ulp(dz_rows.sum(0), dtype)
    return of_y, of_dx, of_dw, of_db


def assert_within(out, ref, same_dtype, bound, factor, own):
    """An error bound for each element, and the budget against torch in the same dtype.

    own: all of it was computed here. Where torch took part, its error is whichever of its kernels
    the layout led to: some sum bf16 in bf16.
    """
    assert out.shape == ref.shape
    assert out.dtype == same_dtype.dtype
    if not out.numel():
        return
    error = (out.double() - ref).abs()
    allowed = factor * (same_dtype.double() - ref).abs().max()
    limit = bound if own else 2 * bound.clamp(min=allowed)
    assert (error <= limit).all(), f"{(error / limit).max():.2f} times the bound"
    worst, allowed = error.max(), allowed + bound.max() / 8 + half_ulp(ref, out.dtype).max()
    few = len(ref.unique()) < 64  # torch may be lucky with all of them
    assert few or not own or worst <= allowed, f"{worst / allowed:.2f} times the budget"


def check(x, w, b, grad, activation, own):
    """Values and gradients of one problem."""
    tensors = (x, w, b)
    with product(own):
        ours = value_and_grads(lambda *t: linear(*t, activation), tensors, grad)
        with torch.no_grad():
            y = linear(*tensors, activation)
    own = own and NATIVE
    assert not own or torch.equal(y, ours[0])
    same = in_torch(*tensors, grad, activation)
    wide = [None if t is None else t.double() for t in tensors]
    ref = value_and_grads(lambda *t: torch_linear(*t, activation), wide, grad.double())
    limits = bounds(x, w, b, grad, activation, own)
    for out, r, s, bound, factor in zip(ours, ref, same, limits, (2, 2, 3, 3), strict=False):
        assert_within(out, r, s, bound, factor, own)


LAYOUTS = ["dense", "transposed", "sliced", "every second", "offset", "one row", "one column"]


def lay_out(t, layout):
    """The same values in memory as the layout says; what lies between them is NaN."""
    if layout == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "sliced":
        big = t.new_full([n + 3 for n in t.shape], NAN)
        inner = big[tuple(slice(1, n + 1) for n in t.shape)]
        return inner.copy_(t)
    if layout == "every second":
        return t.new_full((*t.shape, 2), NAN).copy_(t[..., None]).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.cat([t.new_full((1,), NAN), t.flatten()])[1:].view(t.shape)
    if layout == "one row" and t.shape[0]:
        return t[:1].expand(t.shape)
    if layout == "one column" and t.shape[-1]:
        return t[..., :1].expand(t.shape)
    return t


SMALL = ([0, 1, 2, 3, 13, 14, 15, 29, 64], [1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 0],
         [1, 2, 10, 16, 31, 32, 33, 47, 64, 100, 0])  # fmt: skip
DEEP = [1, 2, 15, 29], [1023, 1030, 2049, 2100, 4100], [1, 10, 33]
TALL = [1022, 1030, 2050], [1, 10, 17], [2, 16, 33]


@st.composite
def problems(draw, dtypes=DTYPES):
    rows, k, n = (
        draw(st.sampled_from(choices))
        for choices in draw(st.sampled_from([SMALL] * 6 + [DEEP, TALL]))
    )
    return {
        "dtype": draw(st.sampled_from(dtypes)),
        "leading": draw(st.sampled_from([(rows,), (rows,), (rows, 2), (3, 1, rows), ()])),
        "k": k,
        "n": n,
        "of_x": draw(st.sampled_from(LAYOUTS)),
        "of_w": draw(st.sampled_from(LAYOUTS)),
        "of_grad": draw(st.sampled_from([*LAYOUTS[:-2], "one number"])),
        "of_b": draw(st.sampled_from(["none", "none", "dense", "every second", "one row"])),
        "spread": draw(st.sampled_from([1.0, 5.0])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "seed": draw(st.integers(0, 2**31)),
    }


def build(dtype, leading, k, n, of_x, of_w, of_grad, of_b, spread, activation, seed):
    """The tensors of a problem."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    # Sums of one number again and again round the same way every time: no measure of accuracy.
    of_w = "dense" if of_x == of_w == "one column" else of_w
    of_grad = "dense" if of_grad == "one number" and "one row" in (of_x, of_w) else of_grad
    x = lay_out(normal(*leading, k).to(dtype), of_x)
    w = lay_out((normal(n, k) * (spread / max(k, 1) ** 0.5)).to(dtype), of_w)
    b = None if of_b == "none" else lay_out(normal(n).to(dtype), of_b)
    grad = normal(*leading, n).to(dtype)
    if of_grad == "one number":
        grad = grad.new_full((), 0.75).expand(grad.shape)
    return x, w, b, lay_out(grad, of_grad), activation
