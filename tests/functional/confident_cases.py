"""Rows whose softmax is close to 1 at the target, and the error that their gradient may have."""

import torch

from fastmp.functional import cross_entropy
from tests.functional.loss_cases import pair, value_and_grad

CONFIDENT = [0.9, 0.99, 0.999, 0.9999]
# One rounding is 0.39% in bf16, 0.049% in fp16.
TRUE_CLASS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 6e-4}
LOSS_LIMIT = 1e-6
GRAD_OUTPUT = 64.0


def confident_rows(classes, dtype, rows):
    """Logits, rounded to dtype, whose softmax is about one of CONFIDENT at the targets; those."""
    p = torch.tensor(CONFIDENT).repeat(rows)[:rows, None]
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(rows, classes, generator=generator)
    y = torch.randint(classes, (rows, 1), generator=generator)
    rest = z.scatter(1, y, -torch.inf).logsumexp(1, keepdim=True)
    return z.scatter(1, y, rest + p.logit()).to(dtype), y[:, 0]


def problems_of(classes, dtype, rows):
    """One target, a pair, smoothing, both, with class weights and every reduction.

    Smoothing of 0.05: at 0.1 and a softmax of 0.9 the gradient is 0.
    """
    z, a = confident_rows(classes, dtype, rows)
    b, lam = (a + 1) % classes, torch.linspace(0.2, 0.8, len(a))
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(0)) + 1
    yield z, a, None, None, None, -100, "sum", 0.0
    yield z, a, b, lam, weight, -100, "mean", 0.0
    yield z, a, None, None, weight, -100, "mean", 0.05
    yield z, a, b, lam, None, -100, "none", 0.05


def check_confident_rows(classes, dtype, value_and_gradient, rows=16, roundings=1):
    """value_and_gradient(*problem), for a grad_output of GRAD_OUTPUT, is that of fp64, row by row.

    Where softmax is close to 1 a difference of 16-bit numbers is wrong by all of it.
    """
    for problem in problems_of(classes, dtype, rows):
        z, a, b, lam, weight, *options = problem
        wide = (None if t is None else t.double() for t in (lam, weight))
        lam64, weight64 = wide

        def exact(z, a=a, b=b, lam=lam64, weight=weight64, options=options):
            return pair(z, a, b, lam, weight, *options)

        value64, grad64 = value_and_grad(exact, z.double(), GRAD_OUTPUT)
        value, grad = (t.detach().cpu().double() for t in value_and_gradient(*problem))
        grad, grad64 = (g.gather(1, a[:, None]) for g in (grad, grad64))
        error = ((grad - grad64) / grad64).abs().max()
        assert error <= roundings * TRUE_CLASS_LIMIT[dtype], f"{100 * error:.3f}% of the gradient"
        error = ((value - value64) / value64).abs().max()
        assert error <= LOSS_LIMIT, f"{error:.1e} of the loss"


def gradient_on(device, scale):
    """The loss and gradient of cross_entropy on a device, where ``scale`` was assumed to come."""

    def value_and_gradient(z, a, b, lam, weight, ignore_index, reduction, smoothing):
        a, b, lam, weight = (None if t is None else t.to(device) for t in (a, b, lam, weight))

        def loss(z):
            return cross_entropy(
                z, a, weight, ignore_index, reduction, smoothing,
                target_b=b, lam=lam, grad_scale=scale,
            )  # fmt: skip

        return value_and_grad(loss, z.to(device), GRAD_OUTPUT)

    return value_and_gradient
