"""The linear kernels against fp64: in Triton's interpreter, or compiled where there is a GPU."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fastmp.backends import torch_linear
from fastmp.backends.triton import linear as backend
from fastmp.backends.triton.kernels import activation as activation_kernels
from fastmp.backends.triton.kernels import linear as kernels
from fastmp.backends.triton.kernels.activation import activation_backward
from fastmp.backends.triton.tiles import MAX_FUSED_K, linear_tile
from fastmp.ops.linear import (
    ACTIVATIONS,
    activate,
    activation_backward_reference,
    backward_reference,
    linear_reference,
    saves_preactivation,
)
from tests.kernels.interpret.conftest import DEVICE
from tests.kernels.interpret.test_activation import GELU_SLOPE, GELU_VALUE, of_gelu

# Exponentials of large numbers are inf, and inf times 0 is in a branch that is not taken.
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")

HALVES = [torch.float16, torch.bfloat16]
FP32 = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=[80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def architecture(request, monkeypatch):
    """The tiles and kernels of other architectures, where the device can run them."""
    if DEVICE == "cuda" and request.param != 80:
        if torch.cuda.get_device_capability()[0] * 10 != request.param:
            pytest.skip("tiles for another architecture")
    else:
        monkeypatch.setattr(kernels, "architecture", lambda device: request.param)
    return request.param


def half_ulp(value, dtype):
    """What one rounding to dtype changes, at most."""
    tiny = 2.0**-25 if dtype == torch.float16 else 2.0**-126
    return torch.finfo(dtype).eps / 2 * value.abs() + tiny


def assert_within(out, ref, same_dtype, bound, factor=2):
    """An error bound for each element, and the budget against torch in the same dtype."""
    assert out.shape == ref.shape
    assert out.dtype == same_dtype.dtype
    error = (out.double() - ref).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"
    budget = factor * (same_dtype.double() - ref).abs().max() + half_ulp(ref, out.dtype).max() / 8
    few = out.numel() < 64  # torch may be lucky with all of them
    assert few or error.max() <= budget, f"{error.max() / budget:.2f} times the budget"


def of_fit(z, y, activation, dtype):
    """What the polynomials of gelu add to the error of y in 16 bits."""
    fitted = activation == "gelu" and dtype != torch.float32
    return of_gelu(z, y.abs(), GELU_VALUE[dtype], dtype) if fitted else 0


def problem(m, n, k, dtype, bias=True):
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    w = (torch.randn(n, k, device=DEVICE) / k**0.5).to(dtype)
    return x, w, torch.randn(n, device=DEVICE).to(dtype) if bias else None


def check(x, w, b, activation, save):
    assert backend.supports_operands(x, w) is None
    y, z = kernels.linear(x, w, b, activation, save)
    wide = [None if t is None else t.double() for t in (x, w, b)]
    ref = F.linear(*wide)
    of_sum = 4 * FP32 * F.linear(*[None if t is None else t.abs() for t in wide])
    out = activate(ref, activation)
    of_act = 0 if activation in ("none", "relu") else 8 * FP32 * ref.abs()
    of_act += of_fit(ref, out, activation, x.dtype)
    same = activate(F.linear(x, w, b), activation)
    assert_within(y, out, same, 1.13 * of_sum + of_act + half_ulp(out, x.dtype))
    if save and saves_preactivation(activation):
        assert_within(z, ref, F.linear(x, w, b), of_sum + half_ulp(ref, x.dtype))
    else:
        assert z.numel() == 0


# ---- y = act(x Wᵀ + b) ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(architecture, activation, dtype):
    check(*problem(72, 136, 72, dtype), activation, save=True)
    check(*problem(72, 136, 72, dtype, bias=False), activation, save=False)


SHAPES = [
    (1, 8, 8),  # less than a tile in every direction
    (64, 64, 128),  # tiles for few rows, exactly
    (3, 200, 328),  # and with a tail in N and K
    (65, 264, 8),  # tiles for a larger M, most of whose rows are out of bounds
    (1200, 392, 40),  # more tiles down than in a group
    (130, 520, 2056),  # long K
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_and_tail(architecture, shape):
    check(*problem(*shape, torch.float16), "gelu", save=True)


def test_each_kind_of_tile_is_tested(architecture):
    tested = {linear_tile(m, k, architecture) for m, _, k in SHAPES}
    assert tested == {linear_tile(m, k, architecture) for m in (1, 65) for k in (8, 9999)}


def test_rows_may_lie_apart(architecture):
    """Slices of wider matrices, whose other columns must not be read, and a bias with a stride."""
    x, w, _ = problem(72, 136, 40, torch.float16)
    wide_x, wide_w = (torch.full((len(t), 64), NAN, device=DEVICE).half() for t in (x, w))
    wide_x[:, 8:48], wide_w[:, 16:56] = x, w
    b = torch.randn(136, 2, device=DEVICE).half()[:, 0]
    check(wide_x[:, 8:48], wide_w[:, 16:56], b, "relu", save=False)


def test_what_is_not_finite_stays_in_its_row(architecture):
    x, w, b = problem(70, 136, 72, torch.float16)
    x[3], x[66, 5], x[69, 0] = INF, NAN, -INF
    y, z = kernels.linear(x, w, b, "silu", True)
    bad = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    bad[[3, 66, 69]] = True
    assert torch.equal(z.isfinite().all(1), ~bad)
    assert y[~bad].isfinite().all()
    assert y[66].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_two_runs_give_the_same_bits(architecture, dtype):
    tensors = problem(130, 264, 72, dtype)
    first, second = (kernels.linear(*tensors, "gelu", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_supported_operands():
    x, w = torch.zeros(4, 64).half(), torch.zeros(8, 64).half()
    supports = backend.supports_operands
    assert supports(x, w) is None
    assert supports(x[:, :8], w[:, 8:16]) is None
    assert supports(x.bfloat16(), w.bfloat16()) is None
    assert supports(x.view(2, 2, 64), w) is None
    assert supports(torch.zeros(2, 64, 3).half().mT, w) is None  # flattening copies
    refused = {
        "fp32": (x.float(), w.float()),
        "two dtypes": (x, w.bfloat16()),
        "K = 60": (x[:, :60], w[:, :60]),
        "N = 7": (x, w[:7]),
        "no rows": (x[:0], w),
        "K = 0": (x[:, :0], w[:, :0]),
        "an address of 2": (x[:, 1:57], w[:, :56]),
        "transposed": (torch.zeros(64, 8).half().t(), w),
        "rows of 65 elements": (torch.zeros(4, 65).half()[:, :64], w),
        "rows 64 MB apart": (x[:1].as_strided((1, 64), (2**25, 1)), w),
        "the same row again": (x[:1].expand(4, 64), w),
    }
    assert [why for why, tensors in refused.items() if supports(*tensors) is None] == []


def test_the_rule_names_every_activation():
    assert set(MAX_FUSED_K) == set(ACTIVATIONS)
    assert not backend.fused_is_faster(8, "none")
    assert backend.fused_is_faster(2048, "gelu")
    assert not backend.fused_is_faster(4096, "gelu")


@pytest.mark.parametrize("dtype", HALVES)
def test_relu_is_the_vendors_epilogue(dtype, monkeypatch):
    """torch's private function is there; without it the kernel takes the call."""
    assert torch_linear.has_epilogue()
    x, w, b = problem(30, 24, 20, dtype)  # rows of 40 bytes: not for the kernel
    y, z = backend.linear(x.view(5, 6, 20), w, b, "relu", True)
    wide = F.linear(x.double(), w.double(), b.double())
    of_sum = 4 * FP32 * F.linear(x.double().abs(), w.double().abs(), b.double().abs())
    ref, same = wide.relu().view(5, 6, 24), F.linear(x, w, b).relu().view(5, 6, 24)
    assert_within(y, ref, same, of_sum.view(5, 6, 24) + half_ulp(wide, dtype).view(5, 6, 24))
    assert z.numel() == 0
    takes = backend.takes_vendor_epilogue
    assert takes(dtype, b, "gelu_tanh", False)
    assert not takes(dtype, b, "gelu_tanh", True)  # which has no z
    assert not takes(dtype, None, "relu", True)
    assert not takes(dtype, b, "gelu", False)
    assert not takes(torch.float32, b, "relu", True)
    monkeypatch.setattr(torch_linear, "has_epilogue", lambda: False)
    assert not takes(dtype, b, "relu", True)
    x, w, b = problem(30, 24, 48, dtype)
    y, _ = backend.linear(x, w, b, "relu", True)
    torch.testing.assert_close(y, F.linear(x, w, b).relu())


# ---- dz = dy · act'(z), db = Σ dz ----


def derivative(grad, saved, activation):
    """torch's own dz, in the dtype of its arguments."""
    if activation == "none":
        return grad
    leaf = saved.detach().requires_grad_()
    return torch.autograd.grad(activate(leaf, activation), leaf, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 24), (600, 8), (257, 136), (70, 257)], ids=str)
def test_gradients(activation, dtype, shape):
    grad, saved = (torch.randn(2, *shape, device=DEVICE) * 3).to(dtype)
    if activation == "relu":
        saved = saved.relu()
    dz, db = activation_backward(grad, saved, activation, True)
    assert dz is grad or activation != "none"
    ref = derivative(grad.double(), saved.double(), activation)
    same = derivative(grad, saved, activation)
    exact = activation in ("none", "relu")
    of_dz = torch.zeros_like(ref) if exact else 8 * FP32 * grad.double().abs()
    if activation == "gelu" and dtype != torch.float32:
        share = torch.special.ndtr(saved.double())
        rest = (ref - share * grad.double()).abs()
        of_dz += of_gelu(saved, share * grad.double().abs() + rest, GELU_SLOPE[dtype], dtype)
    assert_within(dz, ref, same, of_dz + half_ulp(ref, dtype))
    of_db = of_dz.sum(0) + 4 * FP32 * ref.abs().sum(0) + half_ulp(ref.sum(0), dtype)
    assert_within(db, ref.sum(0), same.sum(0), of_db, factor=3)
    y = torch.full_like(saved, NAN)
    alone, nothing = activation_backward(grad, saved, activation, False, y)
    assert torch.equal(alone, dz)
    assert nothing.numel() == 0
    if activation == "none":
        assert y.isnan().all()
    else:
        ref, same = activate(saved.double(), activation), activate(saved, activation)
        of_y = 4 * FP32 * saved.double().abs() + of_fit(saved, ref, activation, dtype)
        assert_within(y, ref, same, of_y + half_ulp(ref, dtype))


def test_gradients_of_many_strips_and_layouts():
    grad, saved = torch.randn(2, 40, 4100, device=DEVICE).half()
    with mock.patch.object(activation_kernels, "num_sms", return_value=1000):
        dz, db = activation_backward(grad.t(), saved.t(), "silu", True)  # 129 strips of 32 rows
    ref = derivative(grad.t().double(), saved.t().double(), "silu")
    same = derivative(grad.t(), saved.t(), "silu")
    assert_within(dz, ref, same, 8 * FP32 * grad.t().double().abs() + half_ulp(ref, dz.dtype))
    total = ref.sum(0)
    bound = 8 * FP32 * grad.t().double().abs().sum(0) + half_ulp(total, dz.dtype)
    assert_within(db, total, same.sum(0), bound, factor=3)


def test_two_backwards_give_the_same_bits():
    grad, saved = torch.randn(2, 300, 136, device=DEVICE).half()
    first, second = (activation_backward(grad, saved, "gelu", True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_derivatives_at_the_ends(activation, dtype):
    """0 at -inf, 1 at inf, and so at the largest numbers; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    saved = torch.tensor([[-INF, -largest, largest, INF, NAN]], device=DEVICE).to(dtype)
    dz, db = activation_backward(torch.ones_like(saved), saved, activation, True)
    if activation == "relu":  # NaN lets the gradient pass, as torch's does
        assert dz[0].tolist() == [0, 0, 1, 1, 1]
    else:
        assert dz[0, :4].tolist() == [0, 0, 1, 1]
        assert dz[0, 4].isnan()
    assert torch.equal(db.isnan(), dz[0].isnan())


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_gradients_of_nothing(shape):
    grad = torch.zeros(shape, device=DEVICE).half()
    dz, db = activation_backward(grad, grad, "gelu", True)
    assert dz.shape == shape
    assert torch.equal(db, torch.zeros(shape[1], device=DEVICE).half())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [48, 20])  # 20: no 16-byte rows, so torch multiplies
def test_the_operation_of_more_dimensions(dtype, k):
    x, w, b, grad = (
        torch.randn(size, device=DEVICE).to(dtype)
        for size in ((3, 5, k), (24, k), (24,), (3, 5, 24))
    )
    supported = backend.supports_operands(x, w) is None
    assert supported == (k == 48)
    linear = backend.linear if supported else linear_reference
    y, z = linear(x, w, b, "silu", True)
    expected_y, expected_z = linear_reference(x.double(), w.double(), b.double(), "silu", True)
    for found, exact in ((y, expected_y), (z, expected_z)):
        assert found.shape == exact.shape
        assert (found - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    found = backend.linear_backward(grad, z, x, w, "silu", [True, True, True])
    exact = backward_reference(
        grad.double(), z.double(), x.double(), w.double(), "silu", [True, True, True]
    )
    found = [*found, *backend.activation_backward(grad, z, "silu", True, True)]
    exact = [*exact, *activation_backward_reference(grad.double(), z.double(), "silu", True, True)]
    for ours, reference in zip(found, exact, strict=True):
        assert ours.shape == reference.shape
        assert (ours - reference).abs().max() <= 4 * torch.finfo(dtype).eps * reference.abs().max()
