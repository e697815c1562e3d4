"""fastmp.nn against torch.nn; functional/test_linear.py has the values of the linear layer."""

import inspect

import pytest
import torch
from torch import nn

import fastmp
from fastmp.functional import MixedTarget
from fastmp.nn import CrossEntropyLoss


def test_the_constructor_is_torchs():
    theirs = inspect.signature(torch.nn.CrossEntropyLoss)
    assert inspect.signature(CrossEntropyLoss).parameters == theirs.parameters
    assert isinstance(CrossEntropyLoss(), torch.nn.CrossEntropyLoss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 6, 3, 3)])
def test_values_and_gradients_are_torchs(reduction, shape):
    torch.manual_seed(0)
    options = {
        "weight": torch.rand(6), "ignore_index": 2, "reduction": reduction,
        "label_smoothing": 0.1,
    }  # fmt: skip
    y = torch.randint(6, shape[:1] + shape[2:] if len(shape) > 1 else ())
    z = torch.randn(shape)
    results = []
    for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        x = z.clone().requires_grad_()
        loss = kind(**options)(x, y)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(*results, equal_nan=True)


def test_mixed_target_and_scale():
    torch.manual_seed(0)
    loss = CrossEntropyLoss(label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    z, a, b = torch.randn(5, 6), torch.randint(6, (5,)), torch.randint(6, (5,))
    x = z.clone().requires_grad_()
    value = loss(x, MixedTarget(a, b, 0.3), grad_scale=1024.0)
    (value * 1024).backward()
    y = z.clone().requires_grad_()
    expected = 0.3 * theirs(y, a) + 0.7 * theirs(y, b)
    (expected * 1024).backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(x.grad, y.grad)


def test_state_dict_is_torchs():
    weight = torch.rand(4)
    ours, theirs = CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())


def test_works_with_torchs_scaler():
    """grad_scale or not, the scaler multiplies the loss and the gradients are the same."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    grads = []
    for with_grad_scale in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        scale = scaler.get_scale() if with_grad_scale else None
        scaler.scale(CrossEntropyLoss()(model(x), y, grad_scale=scale)).backward()
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=0)


def test_a_converted_model_can_be_traced():
    model = fastmp.convert(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.float32
    )
    x = torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_linear_takes_nested_tensors():
    layer = fastmp.nn.Linear(4, 3, activation="relu")
    parts = [torch.randn(2, 4), torch.randn(5, 4)]
    nested = layer(torch.nested.nested_tensor(parts))
    for got, part in zip(nested.unbind(), parts, strict=True):
        torch.testing.assert_close(got, layer(part))


def test_small_problems_of_fast_dtypes_go_to_torch(monkeypatch):
    """There a call costs more than it gains; fp16, slow in torch, never goes to torch."""
    called = []
    monkeypatch.setattr(torch.ops.fastmp, "linear", lambda x, *_: called.append(x.dtype) or [x])
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, width in ((64, 64), (1, 4096), (256, 256), (300, 1024)):
                fastmp.nn.Linear(width, width, dtype=dtype)(torch.randn(rows, width, dtype=dtype))
    assert called == [torch.float32] * 2 + [torch.bfloat16] + [torch.float16] * 4
