"""Rows whose softmax is close to 1 at the target, and the error that their gradient may have."""

import torch

from fastmp.functional import cross_entropy
from tests.functional.loss_cases import pair, value_and_grad

CONFIDENT = [0.9, 0.99, 0.999]
TRUE_CLASS_LIMIT = {torch.bfloat16: 0.005, torch.float16: 0.002}  # one rounding: 0.39%, 0.05%


def confident_rows(p, classes, dtype, rows=16):
    """Logits, rounded to dtype, whose softmax is about p at the targets; the targets."""
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(rows, classes, generator=generator)
    y = torch.randint(classes, (rows, 1), generator=generator)
    rest = z.scatter(1, y, -torch.inf).logsumexp(1, keepdim=True)
    return z.scatter(1, y, rest + torch.tensor(p).logit()).to(dtype), y[:, 0]


def assert_true_class_gradient(z, a, gradient, b=None, lam=None, smoothing=0.0):
    """gradient(z, a, b, lam, smoothing) of the sum is that of fp64 at a, row by row.

    Where softmax is close to 1 a difference of 16-bit numbers is wrong by all of it.
    """
    z64 = z.double().cpu().requires_grad_()
    loss = pair(z64, a, b, lam, None, -100, "sum", smoothing)
    exact = torch.autograd.grad(loss, z64)[0].gather(1, a[:, None])
    found = gradient(z, a, b, lam, smoothing).cpu().double().gather(1, a[:, None])
    error = ((found - exact) / exact).abs().max()
    assert error <= TRUE_CLASS_LIMIT[z.dtype], f"{100 * error:.3f}%"


def check_confident_rows(p, classes, dtype, gradient):
    """One target, a pair, smoothing, and both; 0.05, as at 0.1 and 0.9 the gradient is 0."""
    z, a = confident_rows(p, classes, dtype)
    b, lam = (a + 1) % classes, torch.linspace(0.2, 0.8, len(a), dtype=torch.float64)
    for smoothing in (0.0, 0.05):
        assert_true_class_gradient(z, a, gradient, smoothing=smoothing)
        assert_true_class_gradient(z, a, gradient, b, lam, smoothing)


def gradient_on(device, scale):
    """The gradient of cross_entropy on a device, where ``scale`` was assumed to come."""

    def gradient(z, a, b, lam, smoothing):
        def loss(z):
            return cross_entropy(
                z, a.to(device), reduction="sum", label_smoothing=smoothing, grad_scale=scale,
                target_b=None if b is None else b.to(device),
                lam=None if lam is None else lam.to(device),
            )  # fmt: skip

        return value_and_grad(loss, z.to(device), 1.0)[1]

    return gradient
