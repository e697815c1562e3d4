"""Derivatives of the loss beyond its gradient: what torch.func, forward mode and vmap ask for."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastmp.functional import cross_entropy
from tests.functional.loss_cases import pair


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_says_no(reduction):
    x, w = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    x.requires_grad_()
    loss = cross_entropy(x @ w, torch.tensor([0, 1, 2]), reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    ref = F.cross_entropy(x @ w, torch.tensor([0, 1, 2]), reduction=reduction).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(ref, x)[0])
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.square().sum().backward()  # a path through w exists, and would be half the truth


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_pair", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind", ["jacrev", "jacfwd", "hessian", "jvp", "dual", "vmap", "batched", "vector"]
)
def test_functional_transforms(kind, dtype, with_pair, reduction):
    """torch.func, forward mode, and many grad_outputs at once; fp32 has a native kernel."""
    z, a = torch.randn(5, 7, dtype=dtype), torch.tensor([0, 2, 1, 6, 3])
    b, lam = (a.flip(0), torch.linspace(0, 1, 5).to(dtype)) if with_pair else (None, None)
    weight = torch.linspace(0.5, 2, 7, dtype=dtype)

    def ours(z):
        return cross_entropy(z, a, weight, 2, reduction, 0.1, target_b=b, lam=lam)

    def theirs(z):
        return pair(z, a, b, lam, weight, 2, reduction, 0.1)

    def batched(f):
        x = z.clone().requires_grad_()
        rows = f(x)
        grad_output = torch.eye(rows.numel(), dtype=dtype).reshape(-1, *rows.shape)
        return torch.autograd.grad(rows, x, grad_output, is_grads_batched=True)

    def dual(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(z, z.sin()))).tangent

    ways = {
        "dual": dual,
        "jvp": lambda f: torch.func.jvp(f, (z,), (z.sin(),)),
        "vmap": lambda f: torch.func.vmap(torch.func.jacrev(f))(torch.stack((z, z.cos()))),
        "batched": batched,
        "vector": lambda f: torch.autograd.functional.jacobian(f, z, vectorize=True),
    }
    way = ways.get(kind, lambda f: getattr(torch.func, kind)(f)(z))
    torch.testing.assert_close(way(ours), way(theirs))
