"""Two linear layers and what stands between them, in the forms that a program may have."""

import pytest
import torch
import torch.nn.functional as F

from fastmp.functional import linear
from fastmp.functional.linear import linear_before
from fastmp.functional.linear_autograd import activate_after
from fastmp.ops.linear import activate
from tests.functional.linear_cases import SMOOTH, torch_linear
from tests.functional.test_saved_tensors import Created

M, K, N = 6, 8, 16


def operands(dtype=torch.float32, rows=(M,)):
    """x, W1, b1, W2 and b2 with gradients."""
    shapes = (*rows, K), (N, K), (N,), (K, N), (K,)
    return [(torch.randn(s) / 2).to(dtype).requires_grad_() for s in shapes]


def sequence(x, w1, b1, w2, b2, activation):
    """As in an nn.Sequential of fastmp."""
    return linear(linear(x, w1, b1, activation), w2, b2)


def modules(x, w1, b1, w2, b2, activation):
    """As converted modules in a forward of their own."""
    return linear(activate_after(linear_before(x, w1, b1, activation), activation), w2, b2)


def functions(x, w1, b1, w2, b2, activation):
    """With torch's own activation."""
    return linear(activate(linear_before(x, w1, b1, activation), activation), w2, b2)


def torchs(x, w1, b1, w2, b2, activation):
    return F.linear(torch_linear(x, w1, b1, activation), w2, b2)


def gradients(y, tensors, **options):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(y.square().sum(), wanted, **options)


def assert_torchs(form, tensors, activation="gelu", **tolerance):
    """Values and gradients."""
    ours, theirs = (fn(*tensors, activation) for fn in (form, torchs))
    check_close(ours, theirs, **tolerance)
    check_close(gradients(ours, tensors), gradients(theirs, tensors), **tolerance)


def check_close(ours, theirs, **tolerance):
    """Sums of 16 products in another order."""
    torch.testing.assert_close(ours, theirs, **{"rtol": 1e-5, "atol": 2e-5, **tolerance})


forms = pytest.mark.parametrize("form", [sequence, modules, functions])
smooth = pytest.mark.parametrize("activation", SMOOTH)


def kept_bytes(fn, *tensors):
    """What the graph of fn(*tensors) holds, beside the tensors and the result."""
    created = Created(*(t for t in tensors if isinstance(t, torch.Tensor)))
    with created:
        y = fn(*tensors)
    return created.held() - y.untyped_storage().nbytes()
