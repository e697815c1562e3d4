"""The Triton loss kernel behind fastmp.functional.cross_entropy, against torch in fp64."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastmp.backends import registry
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.cuda import loss as ring_loss
from fastmp.backends.triton import loss as backend
from fastmp.backends.triton.kernels import loss as kernels
from fastmp.backends.triton.kernels import loss_columns, loss_scale
from fastmp.functional import cross_entropy
from fastmp.ops.linear_loss_columns import columns_reference
from fastmp.ops.loss import forward_reference
from tests.functional.confident_cases import GRAD_OUTPUT, check_confident_rows, gradient_on
from tests.functional.loss_cases import DTYPES, check, problems
from tests.kernels.interpret.conftest import DEVICE

pytestmark = [
    # numpy, where the interpreter meets NaN and inf
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]


@pytest.fixture(autouse=True)
def _on_triton():
    """On the CPU the operation calls the interpreted kernels in place of the native library."""
    if DEVICE != "cpu":
        yield
        return
    served = {
        "loss_forward": backend.forward,
        "loss_backward": backend.backward,
        "loss_ensure_grad_": backend.ensure_grad,
    }
    with torch.library._scoped_library("fastmp", "IMPL") as library:
        for name, kernel in served.items():
            serve = registry.serve(name, kernel, registry._kernels[name, "cuda"].supports)
            library.impl(name, serve, "CPU", allow_override=True)
        yield


@settings(
    max_examples=40 if DEVICE == "cpu" else 8,  # a GPU compiles each new shape
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problems())
def test_values_and_gradients_match_torch(case):
    check(case, scales=(None, case[-1]) if DEVICE == "cuda" else (None,), device=DEVICE)


# Kept in registers up to 16,384 classes, longer rows in blocks; odd ones with edges.
@pytest.mark.parametrize("classes", [255, 256, 4099, 16384, 16385, 16392, 33003])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_every_length(classes, dtype, weighted):
    z = (torch.randn(3, classes) * 4).to(dtype)
    z[1, 0] = z[2, -1] = 30  # the largest one of a row at either edge
    a, b = torch.randint(classes, (2, 3))
    b[1] = a[1]
    lam = torch.tensor([0.3, 0.6, 1.0])
    weight = (torch.rand(classes) + 0.1).to(dtype) if weighted else None
    check((z, a, b, lam, weight, -100, "mean", 0.1, 512.0), scales=(512.0,), device=DEVICE)


@pytest.mark.parametrize(
    ("classes", "dtype"), [*itertools.product([10, 1001], DTYPES), (16385, torch.float32)], ids=str
)
def test_the_true_class_of_a_confident_row(classes, dtype):
    for scale in (GRAD_OUTPUT, 3.0):
        check_confident_rows(classes, dtype, gradient_on(DEVICE, scale), rows=4)


def problem(rows=5, classes=1001, dtype=torch.float16, reduction=Reduction.SUM):
    z = torch.randn(rows, classes).to(DEVICE, dtype)
    a, b = torch.randint(classes, (2, rows)).to(DEVICE)
    return z, LossSpec(a, b, torch.tensor(0.25, device=DEVICE), None, -100, reduction, 0.1)


@pytest.mark.parametrize("assumed", [None, 8.0])
@pytest.mark.parametrize("grad_output", [1.0, 8.0, 0.5])
def test_ensure_grad_replaces_the_gradient_of_a_wrong_assumption(assumed, grad_output):
    z, spec = problem()
    assumed = None if assumed is None else torch.tensor(assumed, device=DEVICE)
    grad_output = torch.tensor(grad_output, device=DEVICE)
    _, stats, grad = kernels.forward(z, assumed, True, spec)
    correct = grad_output == (1.0 if assumed is None else assumed)
    if correct:
        grad.fill_(7.0)  # to see that it is left alone
    kernels.ensure_grad(grad, assumed, grad_output, z, stats, spec)
    right = torch.full_like(grad, 7.0) if correct else kernels.backward(grad_output, z, stats, spec)
    assert torch.equal(grad, right)


def test_forward_and_backward_write_the_same_gradient():
    for classes in (10, 1001, 4096, 20011):
        z, spec = problem(classes=classes)
        _, stats, precomputed = kernels.forward(z, None, True, spec)
        grad = kernels.backward(torch.ones((), device=DEVICE), z, stats, spec)
        reference = forward_reference(z.double(), None, True, spec)[2]
        assert (precomputed - reference).abs().max() <= 1e-3
        difference = (precomputed.float() - grad.float()).abs().max()
        assert difference <= 2**-10 * reference.abs().max()


@pytest.mark.parametrize("classes", [10, 1001, 4099, 20011])
def test_the_gradient_takes_the_place_of_the_logits(classes):
    z, spec = problem(classes=classes)
    expected = kernels.forward(z, None, True, spec)
    loss, stats = kernels.forward_in_place(z, None, spec)
    assert all(map(torch.equal, (loss, stats, z), expected))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("columns", [2056, 2051, 1])
def test_columns(columns, pair, weighted):
    """Of 5,000 classes, targets inside and outside; an ignored row may hold anything."""
    first, dtype = 1024, torch.float16
    z = torch.randn(5, columns, device=DEVICE).to(dtype)
    a, b = torch.randint(first, first + columns, (2, 5), device=DEVICE)
    a[1], b[2] = 0, 4999
    a[3] = b[3] = -100
    weight = torch.rand(5000, device=DEVICE) if weighted else None
    rows = torch.rand(5, 5, device=DEVICE)
    z[3], rows[3] = float("nan"), 0
    rows[4] = float("nan")
    arguments = rows, first, a, b if pair else None, weight, -100
    expected = z.clone()
    columns_reference(expected, *arguments)
    loss_columns.columns(z, *arguments)
    torch.testing.assert_close(z, expected, rtol=2e-3, atol=1e-6, equal_nan=True)
    assert (z[3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_scaled_values_are_rounded_once(rows, source, dtype):
    values, factor = torch.randn(rows, 300, device=DEVICE).to(source), torch.tensor(1 / 3)
    out = values.new_empty(values.shape, dtype=dtype)
    loss_scale.scale(out, values, factor.to(DEVICE))
    assert torch.equal(out, (values.float() * factor.to(DEVICE)).to(dtype))


@pytest.mark.parametrize("value", [-1, 1001, 2**40])
@pytest.mark.parametrize("which", ["target_a", "target_b"])
def test_a_target_out_of_range_makes_its_row_nan(value, which):
    z, spec = problem(reduction=Reduction.NONE)
    getattr(spec, which)[2] = value
    loss, _, grad = kernels.forward(z, None, True, spec)
    bad = torch.tensor([False, False, True, False, False], device=DEVICE)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)


def test_an_ignored_row_may_hold_anything():
    z, spec = problem()
    z[1] = float("nan")
    spec.target_a[1] = spec.target_b[1] = -100
    z = z.requires_grad_()
    loss = cross_entropy(z, spec.target_a, target_b=spec.target_b, lam=spec.lam)
    loss.backward()
    assert loss.isfinite()
    assert (z.grad[1] == 0).all()
    assert z.grad.isfinite().all()


def test_values_of_the_rows_may_have_any_stride():
    z, spec = problem(reduction=Reduction.NONE)
    strided = torch.rand(5, 3, device=DEVICE)[:, 1]
    z = z.requires_grad_()
    grads = []
    for lam in (strided, strided.clone()):
        loss = cross_entropy(z, spec.target_a, target_b=spec.target_b, lam=lam, reduction="none")
        grads += torch.autograd.grad(loss.sum(), z)  # a grad_output of stride 0
    assert torch.equal(*grads)
    z, spec = z.detach(), spec._replace(lam=strided)
    _, stats, _ = kernels.forward(z, None, False, spec)
    grad_output = torch.rand(5, 2, device=DEVICE)[:, 0]
    grads = [kernels.backward(g, z, stats, spec) for g in (grad_output, grad_output.clone())]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 10), (3, 1), (1, 1000)])
def test_one_row_and_one_class(rows, classes):
    z = torch.randn(rows, classes)
    y = torch.zeros(rows, dtype=torch.int64)
    check((z, y, None, None, None, -100, "mean", 0.1, 1.0), scales=(None,), device=DEVICE)


def test_two_runs_give_the_same_bits():
    z, spec = problem(rows=70, classes=10, dtype=torch.float32)
    first, second = (kernels.forward(z, None, True, spec) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("classes", [10, 1000])
def test_an_assumed_divisor_is_put_right_where_rows_are_ignored(classes):
    """The bits are those of rows counted first, which a named ignore_index asks for."""
    results = []
    z, spec = problem(rows=6, classes=classes, reduction=Reduction.MEAN)
    for ignored in (-100, -1):
        spec.target_a[1] = spec.target_b[1] = spec.target_b[4] = ignored
        spec = spec._replace(ignore_index=ignored)
        loss, stats, grad = kernels.forward(z, None, True, spec)
        one = torch.ones((), device=DEVICE)
        if ignored == -100:  # and stays so
            assert not torch.equal(grad, kernels.backward(one, z, stats, spec))
            kernels.ensure_grad(grad, None, one, z, stats, spec)
        results.append((loss, grad, stats.abs()))
    assert all(map(torch.equal, *results))


# What torch calls around the kernels without a launch: allocations, views, numbers on the host.
NO_LAUNCH = {
    "aten::empty", "aten::new_empty", "aten::full", "aten::fill_", "aten::detach", "aten::flatten",
    "aten::select", "aten::as_strided", "aten::item", "aten::_local_scalar_dense",
}  # fmt: skip


def launches(run):
    """How many kernels a call launches; on a CPU the interpreter's, and torch's operations."""
    from torch.profiler import ProfilerActivity, profile

    if DEVICE == "cuda":
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        names = [e.name for e in found.events() if e.device_type == device]
        return [name for name in names if "FillFunctor" not in name]  # of poisoned new memory
    from triton.runtime.interpreter import InterpretedFunction

    names, start = [], InterpretedFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        with torch.autograd.profiler.record_function("interpreted"):
            return start(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", counted)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
    inside = [
        (e.time_range.start, e.time_range.end) for e in found.events() if e.name == "interpreted"
    ]
    for e in found.events():
        outside = not any(begin <= e.time_range.start <= end for begin, end in inside)
        if outside and e.name.startswith("aten::") and e.name not in NO_LAUNCH:
            names.append(e.name)
    return names


@pytest.mark.parametrize("classes", [10, 1000, 5000])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_three_launches_both_ways(classes, scale):
    """Four on the CUDA kernel of long rows, whose divisors are counted first."""
    z, spec = problem(classes=classes, dtype=torch.bfloat16)
    z = z.requires_grad_()
    grad_output = torch.tensor(scale or 1.0, device=DEVICE)

    def both_ways():
        loss = cross_entropy(
            z, spec.target_a, label_smoothing=0.1, target_b=spec.target_b, lam=0.3, grad_scale=scale
        )
        torch.autograd.grad(loss, z, grad_output)

    counts = DEVICE == "cuda" and ring_loss.supports(z, None, True, spec) is None
    assert len(launches(both_ways)) == 3 + counts, launches(both_ways)
