"""fastmp.functional.cross_entropy against torch's in fp64, on values, gradients and errors."""

import itertools
from ctypes import CFUNCTYPE, c_int64, c_void_p

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastmp import backends
from fastmp.backends import cpu
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.functional import MixedTarget, cross_entropy
from fastmp.ops.loss import forward_reference
from tests.functional.loss_cases import DTYPES, check, pair, problems, value_and_grad

FAST = settings(max_examples=150, deadline=None, derandomize=True)


@FAST
@given(problems())
def test_values_and_gradients_match_torch(problem):
    grad_output = problem[-1]
    check(problem, scales=(None, grad_output))  # the assumption wrong (for most), and right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [3, 100, 5000])
def test_large_logits_lose_no_digits(dtype, reduction, classes):
    """log-sum-exp rounded to fp32 would be 0.002 off near 6e4; losses here are about 1 to 8."""
    z = torch.full((4, classes), 6e4)
    z[1] = -6e4
    z[2, 1:] = -6e4
    z[3, ::2] = -6e4
    z = z.to(dtype)
    y = torch.tensor([0, 1, 0, 1])
    for grad_output in (1.0, 8.0):
        out, grad = value_and_grad(
            lambda z: cross_entropy(z, y, reduction=reduction), z, grad_output
        )
        ref, ref_grad = value_and_grad(
            lambda z: F.cross_entropy(z, y, reduction=reduction), z.double(), grad_output
        )
        torch.testing.assert_close(out.double(), ref, rtol=1e-6, atol=0)
        tolerance = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(grad.double(), ref_grad, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_images(dtype, reduction):
    torch.manual_seed(0)
    for shape, layout in itertools.product(
        [(3, 5, 7), (2, 19, 4, 3), (0, 4, 2, 2)], [torch.contiguous_format, torch.channels_last]
    ):
        z = torch.randn(shape).to(dtype)
        if z.dim() == 4:
            z = z.contiguous(memory_format=layout)
        a, b = (torch.randint(shape[1], shape[:1] + shape[2:]) for _ in range(2))
        a[..., :1] = -100
        for lam in (torch.tensor(0.25), torch.rand(shape[0])):
            out, grad = value_and_grad(
                lambda z, a=a, b=b, lam=lam: cross_entropy(
                    z, MixedTarget(a, b, lam), label_smoothing=0.1, reduction=reduction
                ),
                z, 1.0,
            )  # fmt: skip
            ref, ref_grad = value_and_grad(
                lambda z, a=a, b=b, lam=lam: pair(
                    z, a, b, lam.double(), None, -100, reduction, 0.1
                ),
                z.double(), 1.0,
            )  # fmt: skip
            torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-6, equal_nan=True)
            tolerance = max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(grad.double(), ref_grad, rtol=tolerance, atol=1e-6)


def test_a_single_row_without_batch():
    z = torch.randn(5, requires_grad=True)
    for target in (torch.tensor(3), torch.tensor([3])):
        for reduction in ("none", "mean"):
            ours = cross_entropy(z, target, reduction=reduction)
            theirs = F.cross_entropy(z, target, reduction=reduction)
            assert ours.shape == theirs.shape == ()
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_ignored_is_nan_like_torch(dtype):
    z = torch.randn(3, 5).to(dtype)
    y = torch.full((3,), -100)
    for reduction in ("mean", "sum", "none"):
        ours, grad = value_and_grad(lambda z, r=reduction: cross_entropy(z, y, reduction=r), z, 1.0)
        theirs = F.cross_entropy(z, y, reduction=reduction)
        torch.testing.assert_close(ours, theirs.float(), equal_nan=True)
        assert not grad.any()


def test_probabilities_go_to_torch():
    z, p = torch.randn(4, 6), torch.rand(4, 6).softmax(1)
    torch.testing.assert_close(cross_entropy(z, p), F.cross_entropy(z, p), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [7, 5000])
def test_values_that_are_not_finite_behave_as_torchs(dtype, smoothing, classes):
    inf, nan = float("inf"), float("nan")
    z = torch.randn(8, classes).to(dtype)
    z[0, 2], z[1, classes - 1], z[2, 3], z[3, 0] = -inf, inf, nan, -inf
    z[4] = -inf
    z[5, : classes - 1] = -inf
    z[6, 0], z[6, classes - 1] = inf, -inf
    y = torch.tensor([1, 1, 1, 0, 1, classes - 1, 0, 1])
    for grad_output, reduction in itertools.product((1.0, 2.0), ("none", "sum")):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        ours, grad = value_and_grad(lambda z, o=options: cross_entropy(z, y, **o), z, grad_output)
        ref, ref_grad = value_and_grad(
            lambda z, o=options: F.cross_entropy(z, y, **o), z.double(), grad_output
        )
        torch.testing.assert_close(ours.double(), ref, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(grad.double(), ref_grad, rtol=1e-2, atol=1e-5, equal_nan=True)


# ---- determinism ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 10), (257, 1000), (33, 5000)])
def test_the_same_bits_for_any_number_of_threads(dtype, shape):
    torch.manual_seed(0)
    z = torch.randn(shape).to(dtype)
    a, b = (torch.randint(shape[1], shape[:1]) for _ in range(2))
    weight, lam = torch.rand(shape[1]), torch.rand(shape[0])
    before = torch.get_num_threads()

    def run(threads, grad_output):
        torch.set_num_threads(threads)
        return value_and_grad(
            lambda z: cross_entropy(z, MixedTarget(a, b, lam), weight, label_smoothing=0.1),
            z, grad_output,
        )  # fmt: skip

    try:
        for grad_output in (1.0, 3.0):
            first = run(1, grad_output)
            for threads in (1, 2, 3):
                again = run(threads, grad_output)
                assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "shared"), [(1024, True), (100, False)])
def test_many_short_rows_are_shared_by_the_threads(rows, shared):
    """A row of 10 classes takes 50 ns, five times what 10 logits of a long one do."""
    library = cpu.load()[0]
    parts = []
    run = CFUNCTYPE(None, c_int64, c_int64, c_void_p)

    @CFUNCTYPE(None, c_int64, c_int64, c_int64, c_void_p, c_void_p)
    def parallel_for(begin, end, grain, body, context):
        parts.append(-(-(end - begin) // grain))
        run(body)(begin, end, context)

    library.fastmp_set_parallel_for(parallel_for)
    try:
        cross_entropy(torch.randn(rows, 10), torch.randint(10, (rows,)))
    finally:
        cpu.use_torch_thread_pool(library)
    assert bool(parts) == shared
    assert all(n >= 4 for n in parts)


# ---- autograd ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_scale_changes_no_result(dtype):
    """Precomputed for the scale, or computed for grad_output: the same gradient."""
    torch.manual_seed(0)
    z = torch.randn(5, 40).to(dtype)
    y = torch.randint(40, (5,))
    by_scale = {}
    for scale in (None, 1024.0, torch.tensor(1024.0), torch.tensor([3.0])):
        loss, grad = value_and_grad(lambda z, s=scale: cross_entropy(z, y, grad_scale=s), z, 1024.0)
        by_scale[scale] = loss, grad
    reference = by_scale[None]
    for loss, grad in by_scale.values():
        assert torch.equal(loss, reference[0])
        torch.testing.assert_close(grad, reference[1], rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("classes", [2, 4, 32])
def test_gradients_are_rounded_to_nearest_even(dtype, bits, classes):
    """Every softmax is 1 / classes, so that grad_output decides the gradient: here a tie."""
    z = torch.zeros(1, classes, dtype=dtype)
    for odd in (1, 3):
        tie = 1 + odd * 2.0**-bits
        for scale in (None, tie * classes):
            _, grad = value_and_grad(
                lambda z, s=scale: cross_entropy(z, torch.tensor([0]), grad_scale=s),
                z, tie * classes,
            )  # fmt: skip
            assert torch.equal(grad[0, 1:], torch.full((classes - 1,), tie).to(dtype))


def test_a_scale_saves_gradients_that_fp16_would_lose():
    """Scaling after the rounding to fp16 would give 0: p/N is 3e-8, half the smallest number."""
    z = torch.zeros(1, 2, dtype=torch.float16)
    z[0, 1] = -17.5
    y = torch.tensor([0])
    _, unscaled = value_and_grad(lambda z: cross_entropy(z, y), z, 1.0)
    assert unscaled[0, 1] == 0
    for scale in (None, 65536.0):
        _, grad = value_and_grad(lambda z, s=scale: cross_entropy(z, y, grad_scale=s), z, 65536.0)
        expected = 65536 * torch.sigmoid(torch.tensor(-17.5, dtype=torch.float64))
        torch.testing.assert_close(grad[0, 1].double(), expected, rtol=1e-3, atol=0)


def test_the_scale_is_the_one_at_the_time_of_the_forward():
    z, scale = torch.randn(3, 4, requires_grad=True), torch.tensor(2.0)
    loss = cross_entropy(z, torch.tensor([0, 1, 2]), grad_scale=scale)
    scale.fill_(8.0)
    (grad,) = torch.autograd.grad(loss, z, torch.tensor(8.0))
    ref = F.cross_entropy(z, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(grad, torch.autograd.grad(ref, z, torch.tensor(8.0))[0])


@pytest.mark.parametrize("grad_scale", [None, 8.0])  # the gradient that comes, and another one
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction, grad_scale):
    z, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    loss = cross_entropy(z, y, reduction=reduction, grad_scale=grad_scale).sum()
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    first.fill_(float("nan"))  # the buffer is the caller's now
    (second,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(second, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


def test_logits_are_never_written():
    for dtype in DTYPES:
        z = torch.randn(50, 33).to(dtype).requires_grad_()
        before = z.detach().clone()
        cross_entropy(z, torch.randint(33, (50,))).backward()
        assert torch.equal(z.detach(), before)


def test_under_autocast():
    linear = torch.nn.Linear(6, 4)
    x, y = torch.randn(3, 6), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(x)
        loss = cross_entropy(z, y)
    assert z.dtype == torch.bfloat16
    loss.backward()
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(dtype, reduction, backend):
    torch.manual_seed(0)
    z, b, lam = torch.randn(6, 9).to(dtype), torch.randint(9, (6,)), torch.tensor(0.3)
    a = torch.randint(9, (6,))

    def fn(z):
        return cross_entropy(
            z * 2, MixedTarget(a, b, lam), label_smoothing=0.1, reduction=reduction, grad_scale=4.0
        )

    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    for grad_output in (1.0, 4.0):
        ours, expected = (
            value_and_grad(compiled, z, grad_output),
            value_and_grad(fn, z, grad_output),
        )
        torch.testing.assert_close(ours, expected)


def op_arguments(dtype, reduction, with_b):
    torch.manual_seed(0)
    rows, classes = 5, 7
    z = torch.randn(rows, classes).to(dtype)
    a, b = (torch.randint(classes, (rows,)) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lam = torch.rand(rows, dtype=wide)
    weight = torch.rand(classes).to(dtype)
    b, lam = (b, lam) if with_b else (None, None)
    return z, LossSpec(a, b, lam, weight, -100, reduction, 0.1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("with_b", [False, True])
def test_opcheck(opcheck, dtype, reduction, with_b):
    z, spec = op_arguments(dtype, reduction, with_b)
    scale = torch.tensor(2.0)
    for compute_grad in (False, True):
        opcheck(torch.ops.fastmp.loss_forward, (z, scale, compute_grad, *spec))
    opcheck(torch.ops.fastmp.loss_forward_, (z.detach().clone(), scale, *spec))
    loss, stats, grad = torch.ops.fastmp.loss_forward(z, scale, True, *spec)
    opcheck(torch.ops.fastmp.loss_backward, (torch.ones_like(loss), z, stats, *spec))
    if reduction == Reduction.NONE:
        return  # never precomputed
    for assumed, grad_output in (
        (scale, scale),
        (scale, torch.tensor(8.0)),
        (None, torch.ones(())),
    ):
        arguments = (grad.clone(), assumed, grad_output, z, stats, *spec)
        opcheck(torch.ops.fastmp.loss_ensure_grad_, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 4099])
def test_the_gradient_takes_the_place_of_the_logits(dtype, classes):
    z = torch.randn(7, classes).to(dtype)
    spec = torch.randint(classes, (7,)), None, None, None, -100, Reduction.MEAN, 0.1
    expected = torch.ops.fastmp.loss_forward(z, None, True, *spec)
    sliced = torch.cat([z, z], 1)[:, :classes]  # the reference serves what is not dense
    results = torch.ops.fastmp.loss_forward_(z, None, *spec)
    assert all(map(torch.equal, (*results, z), expected))
    torch.ops.fastmp.loss_forward_(sliced, None, *spec)
    torch.testing.assert_close(sliced, z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", list(Reduction))
def test_the_reference_is_the_kernel(dtype, reduction):
    z, spec = op_arguments(dtype, reduction, True)
    scale = torch.tensor(2.0)
    ours = torch.ops.fastmp.loss_forward(z, scale, True, *spec)
    theirs = forward_reference(z, scale, True, spec)
    tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-6}
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_the_report_names_the_backend():
    native, reason = cpu.load()
    served = {(s.op, s.device): s for s in backends.report()}["loss", "cpu"]
    assert served.backend == ("reference" if native is None else "cpu")
    assert served.reason == reason
