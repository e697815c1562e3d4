"""The Triton loss kernel behind fastmp.functional.cross_entropy, against torch in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastmp.backends.cpu import loss as cpu_loss
from fastmp.backends.triton import loss as kernels
from fastmp.functional import cross_entropy
from fastmp.ops.loss import forward_reference, settle_cuda
from tests.functional.loss_cases import check, problems
from tests.kernels.interpret.conftest import DEVICE

# numpy, where the interpreter meets NaN and inf
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    """On the CPU the operation calls the interpreted kernels in place of the native library."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cpu_loss, "forward", kernels.forward)
        monkeypatch.setattr(cpu_loss, "backward", kernels.backward)


@settings(
    max_examples=40 if DEVICE == "cpu" else 8,  # a GPU compiles each new shape
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problems())
def test_values_and_gradients_match_torch(problem):
    check(problem, scales=(None, problem[-1]) if DEVICE == "cuda" else (None,), device=DEVICE)


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


def arguments(rows=5, classes=1001, dtype=torch.float16):
    z = torch.randn(rows, classes).to(DEVICE, dtype)
    a, b = torch.randint(classes, (2, rows)).to(DEVICE)
    return z, a, b, torch.tensor(0.25, device=DEVICE), None, -100, 2, 0.1


@pytest.mark.parametrize("expected", [None, 8.0])
@pytest.mark.parametrize("came", [1.0, 8.0, 0.5])
def test_a_gradient_written_ahead_is_settled(expected, came):
    z, *others = arguments()
    expected = None if expected is None else torch.tensor(expected, device=DEVICE)
    came = torch.tensor(came, device=DEVICE)
    _, stats, grad = kernels.forward(z, *others, expected, True)
    saved = (*others[:4], stats, *others[4:])
    foretold = came == (1.0 if expected is None else expected)
    if foretold:
        grad.fill_(7.0)  # to see that it is left alone
    settle_cuda(grad, expected, came, z, *saved)
    right = torch.full_like(grad, 7.0) if foretold else kernels.backward(came, z, *saved)
    assert torch.equal(grad, right)


def test_forward_and_backward_write_the_same_gradient():
    for classes in (10, 1001, 4096, 20011):
        z, *others = arguments(classes=classes)
        _, stats, ahead = kernels.forward(z, *others, None, True)
        one = torch.ones((), device=DEVICE)
        grad = kernels.backward(one, z, *others[:4], stats, *others[4:])
        reference = forward_reference(z.double(), *others, None, True)[2]
        assert (ahead - reference).abs().max() <= 1e-3
        assert (ahead.float() - grad.float()).abs().max() <= 2**-10 * reference.abs().max()


@pytest.mark.parametrize("value", [-1, 1001, 2**40])
@pytest.mark.parametrize("which", ["target", "target_b"])
def test_a_target_out_of_range_makes_its_row_nan(value, which):
    z, a, b, lam, weight, ignore_index, _, smoothing = arguments()
    (a if which == "target" else b)[2] = value
    loss, _, grad = kernels.forward(
        z, a, b, lam, weight, ignore_index, 0, smoothing, None, True
    )  # fmt: skip
    bad = torch.tensor([False, False, True, False, False], device=DEVICE)
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)


def test_an_ignored_row_may_hold_anything():
    z, a, b, lam, *_ = arguments()
    z[1] = float("nan")
    a[1] = b[1] = -100
    z = z.requires_grad_()
    loss = cross_entropy(z, a, target_b=b, lam=lam)
    loss.backward()
    assert loss.isfinite()
    assert (z.grad[1] == 0).all()
    assert z.grad.isfinite().all()


def test_values_for_the_rows_may_lie_anywhere():
    z, a, b, _, *rest = arguments()
    lam = torch.rand(5, 3, device=DEVICE)[:, 1]
    z = z.requires_grad_()
    grads = []
    for share in (lam, lam.clone()):
        loss = cross_entropy(z, a, target_b=b, lam=share, reduction="none")
        grads += torch.autograd.grad(loss.sum(), z)  # an incoming gradient of stride 0
    assert torch.equal(*grads)
    _, stats, _ = kernels.forward(z.detach(), a, b, lam, *rest, None, False)
    incoming = torch.rand(5, 2, device=DEVICE)[:, 0]
    args = (z.detach(), a, b, lam, None, stats, -100, 0, 0.1)
    assert torch.equal(kernels.backward(incoming, *args), kernels.backward(incoming.clone(), *args))


@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1, 10), (3, 1), (1, 1000)])
def test_one_row_and_one_class(rows, classes):
    z = torch.randn(rows, classes)
    y = torch.zeros(rows, dtype=torch.int64)
    check((z, y, None, None, None, -100, "mean", 0.1, 1.0), scales=(None,), device=DEVICE)


def test_two_runs_give_the_same_bits():
    z, *others = arguments(rows=70, classes=10, dtype=torch.float32)
    first, second = (kernels.forward(z, *others, None, True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
