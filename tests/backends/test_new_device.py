"""A device that one file adds, ``dummy.py``, serves every operation."""

import os
import subprocess
import sys

import pytest
import torch

import fastmp
from fastmp import backends, functional

DEVICE = "dummy"


def value_and_grads(fn, *tensors):
    """fn of copies of the tensors, and the gradients of the floating ones, all in main memory."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    y = fn(*leaves)
    grads = torch.autograd.grad(y.float().square().sum(), [t for t in leaves if t.requires_grad])
    return [t.cpu() for t in (y.detach(), *grads)]


def assert_as_on_cpu(fn, *tensors):
    """Values and gradients of fn are those that it has on the CPU."""
    ours = value_and_grads(fn, *(t.to(DEVICE) for t in tensors))
    for found, expected in zip(ours, value_and_grads(fn, *tensors), strict=True):
        torch.testing.assert_close(found, expected)


def linear(calls):
    def layer(x, w, b):
        return functional.linear(x, w, b, "gelu")

    x, w, b = torch.randn(2, 5, 7), torch.randn(4, 7), torch.randn(4)
    assert_as_on_cpu(layer, x, w, b)
    assert calls == {"linear": 1, "linear_backward": 1}
    assert_as_on_cpu(layer, x.double(), w.double(), b.double())  # not supported: the reference
    assert_as_on_cpu(layer, x[0, :1], w, b)  # not worth a call: torch's
    assert calls == {"linear": 1, "linear_backward": 1}


def loss(calls):
    def pair(z):
        return functional.cross_entropy(
            z, a.to(z.device), target_b=b.to(z.device), lam=0.3, label_smoothing=0.1
        )

    a, b = torch.tensor([0, 3, 1]), torch.tensor([2, 2, -100])
    z = torch.randn(3, 4)
    assert_as_on_cpu(pair, z)  # the gradient of loss² is not the assumed one: computed again
    assert calls == {"loss_forward": 1, "loss_backward": 1}
    assert_as_on_cpu(pair, z.double())  # not supported: the reference
    assert calls == {"loss_forward": 1, "loss_backward": 1}


def mix(calls):
    x, index = torch.randint(0, 256, (3, 2, 4, 4)).byte(), torch.tensor([2, 0, 1])
    mean, std = (0.4, 0.5), (0.2, 0.3)
    for dtype in (torch.float32, torch.float16):
        expected = functional.mix(x, 0.3, index, mean=mean, std=std, dtype=dtype)
        out = functional.mix(x.to(DEVICE), 0.3, index.to(DEVICE), mean=mean, std=std, dtype=dtype)
        assert out.device.type == DEVICE
        torch.testing.assert_close(out.cpu(), expected)
    assert calls == {"mix": 2}


def update(calls):
    def steps(device, dtype):
        torch.manual_seed(0)
        params = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)]
        params = [p.to(device).requires_grad_() for p in params]
        optimizer = fastmp.optim.AdamW(params, lr=0.1, max_grad_norm=1.0)
        for i in range(3):
            for p in params:
                p.grad = torch.full(p.shape, 1.0 + i).to(dtype).to(device)
            optimizer.step()
        return [t.cpu() for t in (*params, optimizer.grad_norm, optimizer.applied_steps)]

    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(steps(DEVICE, dtype), steps("cpu", dtype))
    assert calls == {"update": 6}


OPERATIONS = {"linear": linear, "loss": loss, "mix": mix, "update": update}


def run(operation):
    """In a process of its own: torch gets its device once and for the whole process.

    The process ends here: torch's thread for the backward of a device may still hold gradients, and
    where it asks for the lock of an interpreter that is ending, Python 3.11 aborts ("terminate
    called without an active exception", in 1 of 40 runs on a busy machine).
    """
    from tests.backends import dummy

    row = {(row.op, row.device): row for row in backends.report()}[operation, DEVICE]
    assert (row.backend, row.reason) == (DEVICE, "references in main memory")
    OPERATIONS[operation](dummy.calls)
    os._exit(0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_runs_on_a_new_device(operation):
    code = f"from tests.backends.test_new_device import run; run({operation!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
