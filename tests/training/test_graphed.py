"""``fastmp.graphed``: any loop's step, replayed; on a recorder without a device, and as it is."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastmp
from fastmp.schedule import OneCycle
from fastmp.training.graphed import GraphedStep
from tests.training.test_cuda_graph import Recorder


class Loop:
    """A loop of one's own; ``kind`` makes a step of the function."""

    def __init__(self, kind, optimizer="AdamW", **options):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
        made = getattr(fastmp.optim, optimizer)
        self.optimizer = made(self.model.parameters(), lr=0.1, **options)
        self.scaler = fastmp.amp.GradScaler("cpu", init_scale=4.0)
        self.criterion = fastmp.nn.CrossEntropyLoss()
        self.step = kind(self.train)

    def train(self, images, labels, *, smooth=0.0):
        loss = self.criterion(self.model(images), labels) * (1 - smooth)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss


def batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def recorded(step):
    """A step on a recorder that asserts nothing of its own."""
    made = GraphedStep(step, Recorder(list))
    made._recorder.after_replay = lambda: setattr(made._graph, "_held", made._graph._now())
    return made


def log_of(loop):
    return loop.step._recorder.log


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Lion"])
def test_the_numbers_are_those_of_the_loop(optimizer):
    loop, expected = Loop(recorded, optimizer), Loop(lambda step: step, optimizer)
    losses = []
    for seed in range(10):
        size = 3 if seed == 6 else 4
        losses.append((loop.step(*batch(size, seed)), expected.step(*batch(size, seed)).detach()))
        if seed == 7:
            for each in (loop, expected):
                each.optimizer.param_groups[0]["weight_decay"] = 0.5
    for ours, theirs in losses:  # every loss is a tensor of its own
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    for ours, theirs in zip(loop.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    calls = ["run"] * 3 + ["watch", "capture"] + ["replay"] * 2 + ["run", "replay"]
    assert log_of(loop)[:9] == calls
    assert loop.step.reason == ""


def test_it_sees_models_optimizers_and_scalers():
    loop = Loop(recorded)
    loop.step(*batch())
    seen = loop.step._seen
    assert seen.optimizers == [loop.optimizer]
    assert seen.scalers == [loop.scaler]
    assert set(loop.model.modules()) <= set(seen.modules)


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: loop.optimizer.param_groups[0].update(lr=0.01),
        lambda loop: loop.model.eval(),
        lambda loop: loop.model[0].weight.requires_grad_(False),
        lambda loop: loop.scaler.set_growth_factor(4.0),
        lambda loop: OneCycle(0.1, 50).bind(loop.optimizer),
        lambda loop: loop.model.__setitem__(1, torch.nn.Identity()),
    ],
)
def test_what_changes_between_steps_is_recorded_again(change):
    loop = Loop(recorded)
    for _ in range(7):
        loop.step(*batch())
    assert log_of(loop)[-1] == "replay"
    change(loop)
    loop.step(*batch())
    assert log_of(loop)[-1] == "run"
    for _ in range(3):
        loop.step(*batch())
    assert log_of(loop)[-2:] == ["capture", "replay"] or log_of(loop)[-1] == "replay"


def host_lr(loop):
    loop.optimizer.param_groups[0]["lr"] *= 0.9


REFUSED = {
    "returns float": (lambda loop, loss: float(loss.detach()), "returns float"),
    "changes lr": (lambda loop, loss: (host_lr(loop), loss)[1], "changes hyperparameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_a_graph_would_not_repeat_runs_as_it_is(name):
    after, reason = REFUSED[name]

    def make(kind):
        loop = Loop(lambda step: kind(lambda *inputs: after(loop, step(*inputs))))
        return loop

    loop, expected = make(recorded), make(lambda step: step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(8):
            assert loop.step(*batch(4, seed)) == expected.step(*batch(4, seed))
    assert [f"no CUDA graph, the step {reason}" in str(w.message) for w in caught] == [True]
    assert reason in loop.step.reason
    assert "capture" not in log_of(loop)


def test_torchs_optimizers_must_be_capturable():
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())

    @recorded
    def step(x):
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    with pytest.warns(UserWarning, match=r"pass capturable=True, or take fastmp.optim.AdamW"):
        step(torch.ones(2, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels/gpu/test_graphed.py replays there")
def test_without_a_gpu_it_is_the_step():
    loop, expected = Loop(fastmp.graphed), Loop(lambda step: step)
    with pytest.warns(UserWarning, match="CUDA graphs need a CUDA device, the model is on cpu"):
        assert torch.equal(loop.step(*batch()), expected.step(*batch()).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            assert torch.equal(loop.step(*batch(4, seed)), expected.step(*batch(4, seed)).detach())
    assert "CUDA device" in loop.step.reason
    assert loop.step.__name__ == "train"
