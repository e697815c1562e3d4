"""Around a step: hooks, profilers, grad mode; and that its tensors are read in one call of C++."""

import ctypes

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from fastmp.backends import layouts
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
def test_tensors_are_read_in_one_call():
    """Here and wherever the suite runs: Python would do it too, ten times as slowly."""
    params = parameters()
    optimizer = adam_w(params)
    give_gradients(params)
    optimizer.step()
    give_gradients(params, seed=1)
    grads = [p.grad for p in params]
    addresses = optimizer._tables.table._layouts.addresses(params, grads)
    assert addresses.tolist() == [grad.data_ptr() for grad in grads]


@needs_native
def test_other_tensors_are_told_apart(capfd):
    a, b, grad = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    known = layouts.Layouts([a], [grad])
    assert known.addresses([a], [torch.zeros(2, 3)]) is not None
    others = [
        grad.half(),
        grad[:1],
        grad[0],
        torch.ones(3, 2).t(),
        torch._neg_view(grad),
        grad.to("meta"),
        grad.to_sparse(),
        grad.to_mkldnn(),
    ]
    for other in others:
        assert known.addresses([a], [other]) is None
    assert known.addresses([b], [grad]) is None
    assert known.addresses([a, a], [grad]) is None
    a.data = a.data.clone()
    assert known.addresses([a], [grad]) is None
    assert capfd.readouterr().err == ""  # torch would report a failed call there


@needs_native
def test_a_torch_whose_tensors_are_laid_out_differently_is_read_by_python(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "_cdata", property(lambda tensor: id(ctypes)))
    assert layouts.find_offsets() is None
