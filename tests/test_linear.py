"""fastmp.functional.linear and fastmp.nn.Linear against torch's: values, autograd, errors."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from fastmp.backends import cpu
from fastmp.functional import linear
from fastmp.nn import Linear
from fastmp.ops import linear as operation
from fastmp.ops.linear import ACTIVATIONS, activate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = cpu.load()[0] is not None
INF, NAN = float("inf"), float("nan")
SMOOTH = ["gelu", "gelu_tanh", "silu"]
FP32 = torch.finfo(torch.float32).eps


WORTHWHILE = operation.worthwhile


@pytest.fixture(autouse=True, scope="module")
def every_size():
    """The operation, however small the problem."""

    def always(input, weight, activation):
        return True

    with mock.patch.object(operation, "worthwhile", always):
        yield


@contextmanager
def product(own):
    """The library's matrix product, or torch's followed by the library's passes, on any CPU."""
    with mock.patch.object(cpu, "multiplies", return_value=own):
        yield


def torchs(x, w, b=None, activation="none"):
    return activate(F.linear(x, w, b), activation)


def value_and_grads(fn, tensors, grad):
    """fn of the tensors, and the gradient of each that is not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    return y.detach(), *grads


# ---- values ----


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
    same = value_and_grads(lambda *t: torchs(*t, activation), tensors, grad)
    wide = [None if t is None else t.double() for t in tensors]
    ref = value_and_grads(lambda *t: torchs(*t, activation), wide, grad.double())
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_values_and_gradients_match_torch(problem):
    check(*build(**problem), own=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems([torch.float32, torch.bfloat16]))
def test_values_and_gradients_on_torchs_product(problem):
    check(*build(**problem), own=False)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "k", "n"), [(20000, 7, 65), (29, 8192, 33)])
def test_long_sums(rows, k, n, dtype, activation, own):
    """One running sum in fp32 would be up to 70 times further off than torch's sums of sums."""
    x, w, b = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    check(x, w, b, (torch.rand(rows, n) + 0.1).to(dtype), activation, own)


@pytest.mark.parametrize("k", [1024, 4096])
def test_long_products_are_as_accurate_as_torchs(k):
    """The budget with no allowance: 4096 sums are no matter of luck."""
    x, w = torch.randn(64, k), torch.randn(64, k)
    with product(True):
        ours = linear(x, w)
    ref = F.linear(x.double(), w.double())
    error, theirs = (ours - ref).abs(), (torchs(x, w) - ref).abs()
    assert error.max() <= 2 * theirs.max()
    assert error.mean() <= 2 * theirs.mean()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rows", [256, 1022, 20000])
def test_bias_gradient_of_a_mean(rows, own):
    """The same number again and again: each addition rounds the same way. torch is 4 eps off."""
    x, w = torch.randn(rows, 1), torch.randn(18, 1)
    with product(own):
        for value in torch.randn(20):
            _, _, _, db = value_and_grads(linear, (x, w, w[:, 0]), value.expand(rows, 18))
            expected = torch.full((18,), value.item() * rows, dtype=torch.float64)
            torch.testing.assert_close(db.double(), expected, rtol=6 * FP32, atol=0)


def test_a_matrix_of_one_element_with_strides():
    """Neither stride is 1, and torch calls the tensor contiguous all the same."""
    x, w = torch.full((3, 3), 2.0)[1:2, ::3], torch.full((3, 3), 3.0)[1:2, ::3]
    assert x.is_contiguous()
    assert 1 not in x.stride()
    for own in (True, False):
        check(x, w, None, torch.ones(1, 1), "none", own)


def test_shapes_alone_on_the_meta_device():
    x, w, b = (torch.empty(s, device="meta", requires_grad=True) for s in ((2, 5, 3), (4, 3), (4,)))
    y = linear(x, w, b, "silu")
    assert y.shape == (2, 5, 4)
    y.sum().backward()
    assert (x.grad.shape, w.grad.shape, b.grad.shape) == (x.shape, w.shape, b.shape)


# ---- values that are not finite, or nearly so ----

INPUTS = {"inf": INF, "-inf": -INF, "nan": NAN, "largest": 65504.0, "subnormal": 2.0**-24}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["input", "weight", "both"])
@pytest.mark.parametrize("value", INPUTS)
def test_special_values(value, where, dtype, own):
    """NaN and inf where the exact result has them, or where it exceeds the dtype."""
    x, w, b = torch.randn(17, 37), torch.randn(35, 37), torch.randn(35)
    x[2, 5] = w[3, 6] = 0.0  # 0 times inf
    if where != "weight":
        x[1, 3], x[14, 36], x[7, 6] = (INPUTS[value],) * 3
    if where != "input":
        w[0, 3], w[33, 36], w[9, 5] = (INPUTS[value],) * 3
    x, w, b = (t.to(dtype) for t in (x, w, b))
    grad = torch.randn(17, 35).to(dtype)
    with product(own):
        ours = value_and_grads(linear, (x, w, b), grad)
    refs = value_and_grads(F.linear, (x.double(), w.double(), b.double()), grad.double())
    for out, ref in zip(ours, refs, strict=True):
        expected = ref.to(dtype)
        # The fp32 sum may round to the other side of the largest number.
        sure = (ref.abs() / (torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)) - 1).abs()
        sure = ~(sure < 1e-3)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf()[sure], expected.isinf()[sure])
        assert torch.equal(out[sure & expected.isinf()], expected[sure & expected.isinf()])
    if value in ("inf", "nan"):
        assert not ours[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_count(dtype):
    """16-bit subnormals (of bf16: none, they are fp32's own) times numbers that lift them."""
    small = {torch.float32: 2.0**-120, torch.bfloat16: 2.0**-120, torch.float16: 2.0**-24}[dtype]
    x, w = torch.full((3, 19), small, dtype=dtype), torch.full((5, 19), 2.0, dtype=dtype)
    with product(True):
        assert torch.equal(linear(x, w).double(), torch.full((3, 5), 38.0 * small).double())
        assert torch.equal(linear(w, x).double(), torch.full((5, 3), 38.0 * small).double())


def test_sums_are_not_kept_in_fp16():
    """60000 + 60000 - 60000 exceeds fp16 only on the way."""
    x = torch.tensor([[6e4, 6e4, -6e4, 1.0]], dtype=torch.float16)
    with product(True):
        assert linear(x, torch.ones(1, 4, dtype=torch.float16)) == 6e4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_results_are_rounded_to_nearest_even(activation, dtype, bits):
    """Sums that lie in the middle between two numbers."""
    tie = torch.tensor([[1.0, 2.0**-bits], [1.0, 3 * 2.0**-bits]]).to(dtype)
    expected = torch.tensor([1.0, 1 + 4 * 2.0**-bits]).to(dtype)
    ones = torch.ones(19, 2, dtype=dtype)
    with product(True):
        y, transposed = linear(tie, ones, None, activation), linear(ones, tie, None, activation)
        assert torch.equal(y, expected[:, None].expand(2, 19))
        assert torch.equal(transposed, expected.expand(19, 2))
        grad = tie.t().repeat(1, 19)
        _, _, db = torch.ops.fastmp.linear_backward(
            grad, grad, grad[:, :1], grad[:1].t(), activation, [False, False, True]
        )
        assert torch.equal(db, expected.repeat(19))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_nan_stays_in_its_row_and_column(dtype, activation, own):
    x, w = torch.randn(31, 19).to(dtype), torch.randn(35, 19).to(dtype)
    grad = torch.randn(31, 35).to(dtype)

    def nans(x, w):
        results = value_and_grads(lambda x, w: linear(x, w, None, activation), (x, w), grad)
        return [t.isnan() for t in results]

    with product(own):
        for i in range(31):
            broken = x.clone()
            broken[i] = NAN
            y, dx, _ = nans(broken, w)
            expected = torch.arange(31) == i
            assert torch.equal(y, expected[:, None].expand(31, 35))
            assert torch.equal(dx, (expected & (activation != "none"))[:, None].expand(31, 19))
        for j in range(35):
            broken = w.clone()
            broken[j] = NAN
            y, _, dw = nans(x, broken)
            expected = torch.arange(35) == j
            assert torch.equal(y, expected.expand(31, 35))
            assert torch.equal(dw, (expected & (activation != "none"))[:, None].expand(35, 19))


# ---- the activations alone: a weight of 1 ----


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


def alone(fn, z, activation):
    """Value and derivative; the incoming gradient and the weight are 1."""
    one = torch.ones(1, 1, dtype=z.dtype)
    y, dz, _ = value_and_grads(lambda x, w: fn(x, w, None, activation), (z, one), one.expand_as(z))
    return y, dz


def assert_accurate(z, activation):
    """Half an ulp of rounding and a few of fp32, everywhere; where it matters, torch's budget."""
    ours = alone(linear, z, activation)
    theirs = alone(torchs, z, activation)
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
    ref, ref_dz = alone(torchs, z, activation)
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


# ---- autograd: what is kept, what is computed ----

_fixed = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, generator=_fixed) for shape in ((3, 5, 7), (4, 7), (4,)))


def flags(*needed):
    """X, W and B, requiring grad as told."""
    return [t.clone().requires_grad_(need) for t, need in zip((X, W, B), needed, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
)
@pytest.mark.parametrize("own", [True, False])
def test_gradients_only_where_asked(needed, activation, own):
    needed = [bool(need) for need in needed]
    masks = []
    backward = torch.ops.fastmp.linear_backward
    with product(own):
        tensors = flags(*needed)
        y = linear(*tensors, activation)
        with mock.patch.object(
            torch.ops.fastmp, "linear_backward", lambda *a: masks.append(a[-1]) or backward(*a)
        ):
            y.square().sum().backward()
    assert masks == [needed]
    theirs = flags(*needed)
    torchs(*theirs, activation).square().sum().backward()
    for ours, t, need in zip(tensors, theirs, needed, strict=True):
        assert (ours.grad is not None) == need
        torch.testing.assert_close(ours.grad, t.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gradient_no_graph(activation):
    assert linear(X, W, B, activation).grad_fn is None
    with torch.no_grad():
        assert linear(*flags(True, True, True), activation).grad_fn is None
    with torch.inference_mode():
        assert linear(*flags(True, True, True), activation).is_inference()
    assert linear(X, *flags(True, True, True)[1:]).requires_grad


def kept_by(fn):
    """Shapes of what the graph of fn() keeps, beside tensors that live on anyway."""
    kept = []

    def pack(t):
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fn()
    return kept, y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_graph_keeps_only_what_it_needs(activation):
    x, w, b = torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)
    trained = [t.clone().requires_grad_() for t in (x, w, b)]
    extra = [] if activation == "none" else [(6, 3)]  # z, or y for relu
    for tensors, expected in [
        (trained, [(6, 5), (3, 5), (3,)]),
        ((trained[0], w, b), [(3, 5), (3,)]),
        ((x, trained[1], None), [(6, 5)] + [(3, 5)] * (activation != "none")),
        ((x, w, trained[2]), [(3,)]),
    ]:
        kept, _y = kept_by(lambda t=tensors: linear(*t, activation))
        assert sorted(s for s in kept if s != (0,)) == sorted(expected + extra)


def test_a_frozen_weight_lets_the_input_go():
    for frozen in (True, False):
        leaf = torch.randn(6, 5, requires_grad=True)
        x = leaf * 1
        storage = StorageWeakRef(x.untyped_storage())
        y = linear(x, torch.randn(3, 5, requires_grad=not frozen), None, "gelu")
        del x
        assert storage.expired() == frozen
        y.sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_may_be_written_to(activation, shape, own):
    """As torch's: its own memory, no view; only relu's backward needs the value."""
    x, w, b = torch.randn(shape, requires_grad=True), *flags(True, True, True)[1:]
    results = []
    for fn in (linear, torchs):
        with product(own):
            y = fn(x, w, b, activation)
            y.mul_(2)
            if activation == "relu":
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    y.sum().backward()
            else:
                results.append(torch.autograd.grad(y.sum(), (x, w, b)))
    torch.testing.assert_close(*results or (0, 0))


def test_a_changed_weight_is_noticed():
    x, w, b = flags(True, True, True)
    y = linear(x, w, b, "gelu")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_twice(activation):
    tensors = flags(True, True, True)
    y = linear(*tensors, activation)
    first = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors, torch.ones_like(y))


# ---- second derivatives ----


def away_from_kinks(activation):
    """fp64 leaves; for relu every z is at least 0.1 away from 0."""
    generator = torch.Generator().manual_seed(3)
    while True:
        x, w, b = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2), (4, 2), (4,))
        )
        if activation != "relu" or F.linear(x, w, b).abs().min() > 0.1:
            return [t.requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = away_from_kinks(activation)
    for arguments in (tensors, tensors[:2]):
        assert torch.autograd.gradcheck(lambda *t: linear(*t, activation=activation), arguments)
        assert torch.autograd.gradgradcheck(lambda *t: linear(*t, activation=activation), arguments)


def penalty(fn, tensors, activation):
    """The loss of a gradient penalty, and its gradients."""
    x, w, b = (t.detach().requires_grad_() for t in tensors)
    (grad,) = torch.autograd.grad(fn(x, w, b, activation).square().sum(), x, create_graph=True)
    loss = (grad.norm(dim=-1) - 1).square().mean()
    grads = torch.autograd.grad(loss, (x, w, b), allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-4),
                                                     (torch.bfloat16, 0.05, 0.5)])  # fmt: skip
def test_gradient_penalty(dtype, rtol, atol, activation):
    tensors = [t.to(dtype) for t in (X, W, B)]
    ours, theirs = (penalty(fn, tensors, activation) for fn in (linear, torchs))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative_of_an_input_that_depends_on_the_weight(activation):
    """d²/dw² must not count the path from input to weight twice, nor drop it."""
    w, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def second(fn):
        weight, bias = w.clone().requires_grad_(), b.clone().requires_grad_()
        x = torch.tanh(weight @ weight.t() + bias)
        loss = fn(x, weight, bias, activation).pow(3).sum()
        grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (weight, bias))

    torch.testing.assert_close(second(linear), second(torchs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", ["input", "weight", "all but bias"])
def test_second_derivative_with_something_frozen(frozen, activation):
    leaves = flags(frozen == "weight", frozen == "input", True)
    x, w, b = (t.detach().double().requires_grad_(t.requires_grad) for t in leaves)
    wanted = [t for t in (x, w, b) if t.requires_grad]
    y = linear(x, w, b, activation).square().sum()
    if activation == "none" or frozen == "input":
        ours = torch.autograd.grad(y, wanted, create_graph=True)
        y = torchs(x, w, b, activation).square().sum()
        theirs = torch.autograd.grad(y, wanted, create_graph=True)
        torch.testing.assert_close(ours, theirs)
        ours, theirs = (
            torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
            for grads in (ours, theirs)
        )
        torch.testing.assert_close(ours, theirs)
    else:
        with pytest.raises(RuntimeError, match=f"second derivative.*'{activation}'.*torch.nn.func"):
            torch.autograd.grad(y, wanted, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode_derivatives(activation):
    tensors = away_from_kinks(activation)
    for leaves in (tensors, [t.detach() for t in tensors], [t.detach().float() for t in tensors]):
        tangents = [torch.randn_like(t) for t in leaves]
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(t, d)
                for t, d in zip(leaves, tangents, strict=True)
            ]
            ours, theirs = (
                torch.autograd.forward_ad.unpack_dual(fn(*duals, activation)).tangent
                for fn in (linear, torchs)
            )
        torch.testing.assert_close(ours, theirs)


# ---- torch.func, compile, autocast ----


def test_small_problems_are_torchs():
    """Bitwise, and with torch's own backward."""
    wide = torch.randn(512, 512)
    for x, w, ours in [
        (X, W, False),
        (X.bfloat16(), W.bfloat16(), False),
        (X.half(), W.half(), True),  # torch's fp16 is slow at any size
        (X.double(), W.double(), True),
        (wide, wide, True),
        (wide[:3].repeat(1, 64), wide.repeat(1, 64), False),  # too few rows
        (wide.repeat(1, 64), wide[:3].repeat(1, 64), False),
    ]:
        x = x.clone().requires_grad_()
        with mock.patch.object(operation, "worthwhile", WORTHWHILE):
            y = linear(x, w, None, "silu")
        assert (type(y.grad_fn).__name__ == "_LinearBackward") == ours
        assert ours or torch.equal(y, torchs(x, w, None, "silu"))


def test_compiled_code_takes_other_sizes():
    def fn(x, w):
        return linear(x, w, None, "gelu")

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randn(256, 256)
    with mock.patch.object(operation, "worthwhile", WORTHWHILE):
        for rows in (5, 300, 7, 301):
            x, grad = torch.randn(rows, 256), torch.randn(rows, 256)
            ours, eager = (value_and_grads(f, (x, w), grad) for f in (compiled, fn))
            assert all(map(torch.equal, ours, eager))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_functional_transforms(activation):
    def loss(fn):
        return lambda x, w, b: fn(x, w, b, activation).square().sum()

    for transform in (
        lambda fn: torch.func.grad(fn, (0, 1, 2)),
        lambda fn: torch.func.vmap(torch.func.grad(fn, (1, 2)), (0, None, None)),
        lambda fn: torch.func.jacrev(fn),
        lambda fn: torch.func.vmap(fn, (0, None, None)),
    ):
        ours, theirs = (transform(loss(fn))(X, W, B) for fn in (linear, torchs))
        torch.testing.assert_close(ours, theirs)


def test_functional_call():
    module = Linear(7, 4, activation="silu")
    state = {"weight": W.clone().requires_grad_(), "bias": B}
    y = torch.func.functional_call(module, state, (X,))
    torch.testing.assert_close(y, torchs(X, W, B, "silu"))
    (grad,) = torch.autograd.grad(y.sum(), state["weight"])
    expected = torch.func.grad(
        lambda w: torch.func.functional_call(module, {"weight": w, "bias": B}, (X,)).sum()
    )(W)
    torch.testing.assert_close(grad, expected)
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_compiles_into_one_graph(dtype, activation):
    def fn(x, w, b):
        return linear(x * 2, w, b, activation) * 3

    tensors = [t.to(dtype) for t in (X, W, B)]
    grad = torch.randn(3, 5, 4).to(dtype)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    ours, eager = (value_and_grads(f, tensors, grad) for f in (compiled, fn))
    assert all(map(torch.equal, ours, eager))


def test_a_module_with_a_frozen_weight_compiles_under_autocast():
    module = Linear(7, 4, activation="relu")
    module.weight.requires_grad_(False)
    x = X.clone().requires_grad_()

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, module.bias))

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, step(compiled), step(module)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation, dtype):
    tensors, explicit = flags(True, True, True), flags(True, True, True)
    with torch.autocast("cpu", dtype):
        y = linear(*tensors, activation)
        untouched = linear(*(t.double() for t in tensors), activation)
        with torch.autocast("cpu", enabled=False):
            assert linear(*tensors, activation).dtype == torch.float32
    expected = linear(*(t.to(dtype) for t in explicit), activation)
    assert y.dtype == dtype
    assert untouched.dtype == torch.float64
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(tensors, explicit, strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad)


# ---- bad input ----

BAD = {
    "activation": (ValueError, "one of none, relu, .*silu, got 'tanh'", (X, W, B, "tanh")),
    "no activation": (ValueError, "one of none, relu, .*got None", (X, W, B, None)),
    "features": (RuntimeError, r"\(\.\.\., 7\).*\(4, 7\), got \(3, 5, 6\)", (X[..., :6], W, B)),
    "scalar": (RuntimeError, r"\(\.\.\., 7\).*got \(\)", (X[0, 0, 0], W, B)),
    "bias size": (RuntimeError, r"bias must have the shape \(4,\), got \(3,\)", (X, W, B[:3])),
    "bias matrix": (RuntimeError, r"bias must .* \(4,\), got \(1, 4\)", (X, W, B[None])),
    "weight dtype": (RuntimeError, r"weight must.*float32.*got.*float16.*\.to", (X, W.half(), B)),
    "bias dtype": (RuntimeError, r"bias must.*float32.*got.*float16.*\.to", (X, W, B.half())),
    "input dtype": (RuntimeError, "weight must.*float64.*float32", (X.double(), W, B)),
    "integer": (RuntimeError, r"floating-point, got torch.int32; call .float\(\)", (X.int(), W, B)),
    "weight device": (RuntimeError, "weight.*device.*cpu.*got meta.*call", (X, W.to("meta"), B)),
    "bias device": (RuntimeError, "bias.*device.*cpu.*got meta.*call", (X, W, B.to("meta"))),
    "input device": (RuntimeError, "weight.*device.*meta.*got cpu.*call", (X.to("meta"), W, B)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    error, text, arguments = BAD[name]
    with pytest.raises(error, match=f"(?s){text}"):
        linear(*arguments)


def test_a_vector_as_weight_behaves_as_torchs():
    for x in (X, X[0, 0]):
        assert torch.equal(linear(x, W[0], None, "relu"), F.relu(F.linear(x, W[0])))
        assert torch.equal(linear(x, W[0], B[0]), F.linear(x, W[0], B[0]))


# ---- the module ----


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_torchs(bias):
    modules = []
    for kind in (Linear, torch.nn.Linear):
        torch.manual_seed(1)
        modules.append(kind(7, 4, bias, dtype=torch.float64))
    ours, theirs = modules
    assert isinstance(ours, torch.nn.Linear)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
        assert value.dtype == torch.float64
    torch.testing.assert_close(ours(X.double()), theirs(X.double()))
    assert Linear(7, 4, bias, "meta").weight.device.type == "meta"


def test_the_module_takes_torchs_state_and_is_copied_with_its_activation():
    theirs, ours = torch.nn.Linear(7, 4), Linear(7, 4, activation="gelu")
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), F.gelu(theirs(X)))
    assert torch.equal(copy.deepcopy(ours)(X), ours(X))


def test_the_module_says_what_it_is():
    text = "Linear(in_features=7, out_features=4, bias=False, activation=gelu_tanh)"
    assert repr(Linear(7, 4, bias=False, activation="gelu_tanh")) == text
    with pytest.raises(ValueError, match=r"one of none, relu, .*silu, got 'tanh'"):
        Linear(7, 4, activation="tanh")


def test_hooks_of_the_module_run():
    module, seen = Linear(7, 4, activation="relu"), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.weight.register_post_accumulate_grad_hook(lambda _: seen.append("grad"))
    module(X.clone().requires_grad_()).sum().backward()
    assert sorted(seen) == ["after", "backward", "before", "grad"]
