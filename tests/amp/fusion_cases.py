"""Small models to fuse, what was fused in them, and the check that no value changed."""

import copy

import torch
from torch import nn

from fastmp.amp.fusion import fuse_linear


def graph_of(y):
    """The names and nodes of its backward, the first of the forward first."""
    nodes, seen = [y.grad_fn], []
    while nodes:
        node = nodes.pop(0)
        if node not in seen:
            seen.append(node)
            nodes += [following for following, _ in node.next_functions if following is not None]
    return [(type(node).__name__, node) for node in seen[::-1]]


def fused(y):
    """How the backward of y takes its activations, the first of the forward first.

    "gelu": one operation with its layer; "after gelu": one pass for its gradient and the bias's.
    """
    found = []
    for name, node in graph_of(y):
        if name == "_LinearBackward" and node.activation != "none":
            found.append(node.activation)
        elif name == "_ActivationBackward":
            found.append(f"after {node.activation}")
    return found


def recomputed(y):
    """The activations that the backward of y computes again for the layers after them."""
    inputs = [node.input_activation for name, node in graph_of(y) if name == "_LinearBackward"]
    return [activation for activation in inputs if activation is not None]


class Block(nn.Module):
    """fc, act and out, for the tests to call in their ways."""

    def __init__(self, act=None):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = act or nn.GELU()
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


def chain(act=None):
    return nn.Sequential(nn.Linear(4, 4), act or nn.GELU(), nn.Linear(4, 3))


def results(model, x):
    """The output and all gradients, in training mode."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    grads = torch.autograd.grad(y.square().mean(), [x, *model.parameters()])
    return [y.detach(), *grads]


def assert_unchanged(model, x, change=fuse_linear):
    """Fused and unfused, the model gives the same values, in both modes; what was fused."""
    before = copy.deepcopy(model)
    assert change(model) is model
    torch.testing.assert_close(results(model, x), results(before, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(x), before.eval()(x), rtol=1e-5, atol=1e-5)
    return fused(model.train()(x))
