"""Optimizers, parameters to try them on, and their masters."""

import pytest
import torch

import fastmp
from fastmp.ops.update import join_master

SHAPES = [(3, 5), (1,), (0,), (16384,), (97, 173), (2, 3, 4, 5), (16385,)]
CASES = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("AdamW", {"betas": (0.5, 0.9), "eps": 1e-6}),
    # eps above the noise of g + wd p where the two cancel: Adam would divide noise by noise
    ("Adam", {"weight_decay": 0.1, "eps": 1e-4}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True}),
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
]
case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
adam_w = fastmp.optim.AdamW


def parameters(dtype=torch.float32, shapes=SHAPES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def give_gradients(*models, scale=1.0, seed=0):
    """The same random gradients to every list of parameters, in each one's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*models, strict=True):
        grad = torch.randn(params[0].shape, generator=generator) * scale
        grad = grad.to(params[0].dtype)
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def steps(optimizer, params, count=4, first=0):
    """As many steps, each with gradients of its own; ``first``: the number of the first one."""
    for seed in range(first, first + count):
        give_gradients(params, seed=seed)
        optimizer.step()


def masters(optimizer, params):
    """The fp32 value behind every parameter."""
    found = []
    for p in params:
        state = optimizer.state[p]
        if "remainder" in state:
            found.append(join_master(p.detach(), state["remainder"]))
        else:
            found.append(state.get("master", p.detach()))
    return found


def snapshot(optimizer, params):
    state = [t.clone() for p in params for t in optimizer.state[p].values()]
    return [p.detach().clone() for p in params] + state


def same_bits(a, b):
    def bits(t):
        return t.contiguous().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))
