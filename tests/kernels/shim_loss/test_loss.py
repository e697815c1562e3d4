"""csrc/cuda/loss.cu against torch in fp64: everything the operation promises."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastmp.backends import registry
from fastmp.backends.abi import LossSpec, Reduction
from fastmp.backends.cuda import loss
from fastmp.functional import cross_entropy
from fastmp.ops.loss import forward_reference
from tests.functional.confident_cases import (
    GRAD_OUTPUT,
    check_confident_rows,
    gradient_on,
)
from tests.functional.linear_cases import lay_out
from tests.functional.loss_cases import DTYPES, check, problems
from tests.kernels.shim_loss.conftest import Function

LAYOUTS = ["dense", "transposed", "sliced", "every second", "offset"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems())
def test_values_and_gradients_match_torch(served, case):
    check(case, scales=(None, case[-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [9, 1001, 4096])
def test_rows_that_start_anywhere(served, classes, dtype, layout):
    """Gradients have other boundaries than logits that are sliced or offset."""
    z = lay_out((torch.randn(5, classes) * 4).to(dtype), layout)
    a, b = torch.randint(classes, (2, 5))
    b[1] = a[1]
    a[2] = b[3] = -100
    lam, weight = torch.rand(5), (torch.rand(classes) + 0.1).to(dtype)
    lam, weight = lay_out(lam, layout), lay_out(weight, layout)
    check((z, a, b, lam, weight, -100, "mean", 0.1, 512.0), scales=(512.0,))


@pytest.mark.parametrize("classes", [10, 1001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_true_class_of_a_confident_row(served, dtype, classes):
    check_confident_rows(classes, dtype, gradient_on("cpu", GRAD_OUTPUT))


VOCABULARIES = [
    (50257, torch.bfloat16),
    (32000, torch.float16),
    (128256, torch.bfloat16),
    (50257, torch.float32),
]


@pytest.mark.parametrize(("classes", "dtype"), VOCABULARIES)
def test_vocabularies(served, classes, dtype):
    z = (torch.randn(3, classes) * 3).to(dtype)
    a, b = torch.randint(classes, (2, 3))
    check((z, a, b, torch.rand(3), None, -100, "mean", 0.1, 8.0), scales=(8.0,))


def problem(rows=5, classes=1001, dtype=torch.float16, reduction=Reduction.SUM):
    z = torch.randn(rows, classes).to(dtype)
    a, b = torch.randint(classes, (2, rows))
    return z, LossSpec(a, b, torch.tensor(0.25), None, -100, reduction, 0.1)


@pytest.mark.parametrize("value", [-1, 1001, 2**40])
@pytest.mark.parametrize("which", ["target_a", "target_b"])
def test_a_target_out_of_range_makes_its_row_nan(served, value, which):
    z, spec = problem(reduction=Reduction.NONE)
    getattr(spec, which)[2] = value
    row_loss, _, grad = loss.forward(z, None, True, spec)
    bad = torch.tensor([False, False, True, False, False])
    assert torch.equal(row_loss.isnan(), bad)
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)


def test_an_ignored_row_may_hold_anything(served):
    z, spec = problem(rows=9)
    for row in (0, 4, 5, 8):
        z[row] = float("nan")
        spec.target_a[row] = spec.target_b[row] = -100
    z.requires_grad_()
    mean = cross_entropy(z, spec.target_a, target_b=spec.target_b, lam=spec.lam)
    mean.backward()
    assert mean.isfinite()
    assert (z.grad[[0, 4, 5, 8]] == 0).all()
    assert z.grad.isfinite().all()


def test_the_statistics_serve_the_backward(served):
    """Of another grad_output than the assumed one: the kernel of the other backend."""
    z, spec = problem(reduction=Reduction.MEAN)
    _, stats, grad = loss.forward(z, torch.tensor(8.0), True, spec)
    again = torch.ops.fastmp.loss_backward(torch.tensor(8.0), z, stats, *spec)
    torch.testing.assert_close(grad, again, rtol=2e-3, atol=1e-7)
    exact = forward_reference(z.double(), None, False, spec)[1]
    torch.testing.assert_close(stats[:-1].double(), exact[:-1], rtol=1e-6, atol=0)


def test_neither_the_run_nor_the_grid_changes_a_bit(served, monkeypatch):
    z, spec = problem(rows=13, dtype=torch.float32, reduction=Reduction.MEAN)
    results = []
    for multiprocessors in (2, 2, 4, 6):
        monkeypatch.setattr(loss, "_num_sms", lambda device, n=multiprocessors: n)
        results.append(loss.forward(z, None, True, spec))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@pytest.mark.parametrize("classes", [1000, 1001])
def test_the_gradient_takes_the_place_of_the_logits(served, classes):
    z, spec = problem(rows=13, classes=classes)
    expected = loss.forward(z, None, True, spec)
    row_loss, stats = loss.forward_in_place(z, None, spec)
    assert all(map(torch.equal, (row_loss, stats, z), expected))


def test_the_launches(served):
    z, spec = problem(reduction=Reduction.MEAN)
    loss.forward(z, None, True, spec)
    assert [name.partition("<")[0] for name in Function.launches] == [
        "fastmp::loss_divisors",
        "fastmp::loss_rows" if served.cluster == 1 else "fastmp::loss_half_rows",
        "fastmp::loss_sum",
    ]
    for reduction, launches in ((Reduction.SUM, 3), (Reduction.NONE, 2)):
        Function.launches.clear()
        loss.forward(z, None, True, spec._replace(reduction=reduction))
        assert len(Function.launches) == launches


def test_numbers_of_the_host_and_of_the_device_are_the_same(served, monkeypatch):
    z, spec = problem(reduction=Reduction.MEAN)
    of_host = loss.forward(z, torch.tensor(8.0), True, spec)
    monkeypatch.setattr(registry, "on_host", lambda tensor: False)
    assert all(map(torch.equal, of_host, loss.forward(z, torch.tensor(8.0), True, spec)))


@pytest.mark.parametrize("rows", [19, 160, 347])
def test_the_sum_of_many_rows(served, rows):
    """A thread takes 8 rows at a time: 160 rows are a whole turn."""
    z, spec = problem(rows, 9, torch.float32)
    each = loss.forward(z, None, True, spec._replace(reduction=Reduction.NONE))[0]
    total = loss.forward(z, None, True, spec)[0]
    torch.testing.assert_close(total.double(), each.double().sum(), rtol=1e-6, atol=0)


def test_what_is_left_to_the_other_backend(monkeypatch):
    def reason(classes, dtype=torch.bfloat16, compute_grad=True, shared=228 << 10):
        monkeypatch.setattr(loss, "sm_shared", lambda device: shared)
        z = torch.empty(1, dtype=dtype).expand(2, classes)
        return loss.supports(z, None, compute_grad, problem()[1])

    assert reason(32000) is None
    assert reason(128256) is None
    assert "at most 4096 classes" in reason(4096)
    assert "the loss alone" in reason(32000, compute_grad=False)
    assert "9.0" in reason(32000, shared=0)
    assert "two multiprocessors" in reason(128256, torch.float32)
    assert "float64" in reason(32000, torch.float64)
    sliced = torch.empty(2, 32001, dtype=torch.bfloat16)[:, 1:]
    assert "dense" in loss.supports_in_place(sliced, None, problem()[1])
    assert loss.supports_in_place(sliced.contiguous(), None, problem()[1]) is None


def test_any_class_may_be_ignored(served):
    z, spec = problem(rows=9, dtype=torch.float32)
    for row in (1, 4):
        z[row] = float("nan")
        spec.target_a[row] = spec.target_b[row] = 7
    spec.target_a[5] = 7
    check((z.nan_to_num(), *spec[:4], 7, "mean", 0.1, 8.0), scales=(8.0,))
    assert loss.forward(z, None, True, spec._replace(ignore_index=7))[2].isfinite().all()


def test_the_loss_of_a_sure_row_keeps_its_digits(served):
    z = torch.randn(4, 1001)
    z[:, 5] = z.logsumexp(1) + torch.tensor([5.0, 9.0, 13.0, 16.0])
    spec = LossSpec(torch.full((4,), 5), None, None, None, -100, Reduction.NONE, 0.0)
    exact = torch.nn.functional.cross_entropy(z.double(), spec.target_a, reduction="none")
    found = loss.forward(z, None, True, spec)[0].double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponents_from_far_away(served, dtype):
    """Sums are relative to the first logits of a thread, and begin again where those were low."""
    z = torch.randn(12, 1001) * 3
    z[0] = -3e4
    z[1] += 3e4
    z[2, ::2] = -3e4
    z[3, 500:] += 100
    z[4, :960] = -torch.inf
    z[5, 77], z[6, 1000], z[7, 0] = 300.0, 300.0, 300.0
    if dtype != torch.float16:
        z[8], z[9, ::3], z[10], z[11, :960] = -1e9, 2.0**30, -(2.0**31), -1e30
    z = z.to(dtype)
    a, b = torch.randint(961, 1001, (2, 12))
    spec = LossSpec(a, b, torch.tensor(0.25), None, -100, Reduction.NONE, 0.0)
    found, stats, grad = loss.forward(z, torch.tensor(8.0), True, spec)
    wide = spec._replace(lam=torch.tensor(0.25).double())
    exact, exact_stats, exact_grad = forward_reference(
        z.double(), torch.tensor(8.0).double(), True, wide
    )
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(stats.double(), exact_stats, rtol=2e-6, atol=1e-30)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact_grad, rtol=max(eps, 4e-6), atol=1e-7)


def test_a_thread_without_logits_beside_a_large_one(served):
    """The lowest number, its maximum, is further from 2e37 than any fp32 number is large."""
    z = torch.zeros(2, 9)
    z[:, 3] = 2e37
    spec = LossSpec(torch.tensor([3, 4]), None, None, None, -100, Reduction.NONE, 0.1)
    exact = forward_reference(z.double(), None, False, spec)[0]
    found = loss.forward(z, None, True, spec)[0].double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
