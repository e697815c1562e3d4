"""Out to plain PyTorch and back: fp32 weights, and torch's optimizer state, without loss."""

import copy

import pytest
import torch
from torch import nn

import fastmp
from tests.compat.conftest import Classifier, Points


def steps(model, optimizer, points, count):
    for number in range(count):
        x, y = points.points[number::7], points.labels[number::7]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()


KINDS = {
    "AdamW": {"lr": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}


def out(model, optimizer, name):
    """The fp32 model and torch's optimizer that go on where ours are."""
    plain = Classifier()
    with torch.no_grad():
        for p, exact in zip(plain.parameters(), optimizer.masters(), strict=True):
            p.copy_(exact)
    torchs = getattr(torch.optim, name)(plain.parameters(), **KINDS[name])
    torchs.load_state_dict(optimizer.state_dict())
    return plain, torchs


def back(plain, torchs, name, dtype):
    """The 16-bit model and our optimizer that go on where torch's are."""
    model = fastmp.convert(copy.deepcopy(plain), dtype)
    optimizer = getattr(fastmp.optim, name)(model.parameters(), **KINDS[name])
    optimizer.load_state_dict(torchs.state_dict())
    optimizer.load_masters([p.detach() for p in plain.parameters()])
    return model, optimizer


def bits(optimizer, *skipped):
    """All that the optimizer knows of its parameters."""
    state = optimizer.state_dict()["state"]
    kept = {n: {k: v for k, v in s.items() if k not in skipped} for n, s in state.items()}
    return kept, optimizer.masters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name, dtype):
    """16-bit run -> plain PyTorch -> 16-bit run: not a bit of weights, masters, moments is lost."""
    torch.manual_seed(0)
    model = Classifier() if dtype == torch.float32 else fastmp.convert(Classifier(), dtype)
    optimizer = getattr(fastmp.optim, name)(model.parameters(), **KINDS[name])
    points = Points(dtype)
    steps(model, optimizer, points, 5)
    again, twin = back(*out(model, optimizer, name), name, dtype)
    if dtype == torch.float32:
        assert type(again[0]) is nn.Linear or type(again[0]) is fastmp.nn.Linear
    skipped = ["step"] if name == "SGD" else []  # torch's SGD counts no steps
    (a, exact), (b, expected) = bits(twin, *skipped), bits(optimizer, *skipped)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(exact, expected, strict=True))
    steps(model, optimizer, points, 5)
    steps(again, twin, points, 5)
    for x, y in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", KINDS)
def test_from_plain_torch_and_out_again(name):
    """fp32 run -> bf16 run, not stepped -> fp32 run: the fp32 weights are what they were."""
    torch.manual_seed(0)
    plain = Classifier()
    torchs = getattr(torch.optim, name)(plain.parameters(), **KINDS[name])
    steps(plain, torchs, Points(torch.float32), 5)
    ours = back(plain, torchs, name, torch.bfloat16)
    assert not torch.equal(ours[0][0].weight.float(), plain[0].weight)  # it has been rounded
    again, _ = out(*ours, name)
    for x, y in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_masters_that_do_not_fit_are_refused_before_anything_changes():
    model = fastmp.convert(Classifier(), torch.bfloat16)
    optimizer = fastmp.optim.SGD(model.parameters(), lr=0.1)
    before = optimizer.masters()
    values = [torch.zeros_like(v) for v in before]
    for wrong in (values[:-1], [*values[:-1], torch.zeros(7)]):
        with pytest.raises(ValueError, match="expected 4 values of the parameters' shapes"):
            optimizer.load_masters(wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.masters(), strict=True))
    assert not optimizer.state
