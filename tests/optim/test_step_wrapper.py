"""Around a step: hooks, profilers, grad mode; and that its tensors are read in one call of C++."""

import ctypes

import numpy as np
import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from fastmp.backends import layouts
from fastmp.optim import SGD
from tests.native import needs_native
from tests.optim.optim_cases import adam_w, give_gradients, parameters


def prepared(**options):
    params = parameters()
    optimizer = adam_w(params, **options)
    give_gradients(params)
    return optimizer


def test_hooks_of_the_optimizer_and_of_all_run_once():
    optimizer, calls = prepared(), []
    optimizer.step()
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    ]
    for handle, expected in zip(
        handles,
        (
            ["all pre", "pre", "post", "all post"],
            ["all pre", "post", "all post"],
            ["all pre", "all post"],
            ["all post"],
        ),
        strict=True,
    ):
        calls.clear()
        optimizer.step()
        handle.remove()
        assert calls == expected
    calls.clear()
    optimizer.step()
    assert calls == []


def test_a_profiler_sees_the_step():
    optimizer = prepared()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("enabled", [False, True])
def test_grad_mode_is_as_before_after_a_step_and_an_error(enabled):
    optimizer = prepared()
    with torch.set_grad_enabled(enabled):
        assert optimizer.step(torch.is_grad_enabled)
        optimizer.param_groups[0]["params"][0].data = torch.ones(1, 1)
        with pytest.raises(ValueError, match="expected shape"):
            optimizer.step()
        assert torch.is_grad_enabled() == enabled


# ---- addresses and layouts in one call ----


@needs_native
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema": 0.9}], ids=str)
def test_a_step_is_one_reading(monkeypatch, options):
    """Here and wherever the suite runs: Python would do it too, ten times as slowly."""
    optimizer = prepared(**options)
    optimizer.step()
    monkeypatch.setattr(type(optimizer), "_collect", None)
    monkeypatch.setattr(torch.autograd.graph, "increment_version", None)
    for seed in range(3):
        give_gradients(optimizer.param_groups[0]["params"], seed=seed)
        optimizer.step()
    assert optimizer.applied_steps == 4


def reader_of(params):
    """Of one group; with the addresses that it writes."""
    addresses = np.zeros(sum(p.grad is not None for p in params), np.int64)
    reader = layouts.TensorReader.of([params], addresses)
    return reader, addresses


@needs_native
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_and_versions_are_read(strided):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    for p in params[1:]:
        p.grad = torch.ones(2, 3)
    addresses = np.zeros((3, 5), np.int64)[:, 2] if strided else np.zeros(3, np.int64)
    reader = layouts.TensorReader.of([params[:2], params[2:]], addresses)
    for p in params[1:]:
        p.grad = torch.zeros(2, 3)
        p.detach().add_(1)
    assert reader.read([params[:2], params[2:]])
    assert addresses.tolist() == [p.grad.data_ptr() for p in params[1:]]
    assert reader.version_sum == sum(p._version for p in params)
    reader.raise_versions()
    assert [p._version for p in params] == [0, 2, 2, 2]


@needs_native
def test_other_tensors_are_told_apart(capfd):
    p, other = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2, 3))
    p.grad_dtype = None  # any
    p.grad = grad = torch.ones(2, 3)
    reader, _ = reader_of([p])
    p.grad = torch.zeros(2, 3)
    assert reader.read([[p]])
    for p.grad in (None, grad.half(), torch._neg_view(grad), grad.to_sparse()):
        assert not reader.read([[p]])
    p.grad = other.grad = grad
    for groups in ([[other]], [[p, p]], [[p], [p]], [[p], []], [[]], [], [(p,)]):
        assert not reader.read(groups)
    grad.data = torch.ones(3, 2).t()
    assert not reader.read([[p]])
    grad.data = torch.ones(3, 2)
    assert not reader.read([[p]])
    grad.data = torch.ones(2, 3)
    assert reader.read([[p]])
    p.data = p.data.clone()
    assert not reader.read([[p]])
    assert capfd.readouterr().err == ""  # torch would report a failed call there


class Doubled(torch.nn.Parameter):
    """Its ``grad`` is twice torch's."""

    @property
    def grad(self):
        return 2 * torch.Tensor.grad.__get__(self)


def test_a_class_with_a_gradient_of_its_own_is_read_by_python():
    p = Doubled(torch.ones(3))
    optimizer = SGD([p], lr=1.0)
    for step in range(3):
        torch.Tensor.grad.__set__(p, torch.full((3,), float(step)))
        optimizer.step()
    assert p.tolist() == [1.0 - 2 * (0 + 1 + 2)] * 3


@needs_native
def test_tensors_without_a_version_are_read_by_python():
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        assert reader_of([p])[0] is None


@needs_native
def test_a_torch_whose_tensors_are_laid_out_differently_is_read_by_python(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "_cdata", property(lambda tensor: id(ctypes)))
    assert layouts.find_offsets() is None
