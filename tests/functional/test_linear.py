"""fastmp.functional.linear against torch's: values, errors; and fastmp.nn.Linear."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastmp.functional import linear
from fastmp.nn import Linear
from tests.functional.linear_cases import (
    DTYPES,
    FP32,
    NAN,
    B,
    W,
    X,
    build,
    check,
    problems,
    product,
    torch_linear,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("every_size")

INF = float("inf")


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
    error, theirs = (ours - ref).abs(), (torch_linear(x, w) - ref).abs()
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
