"""The training step: where it follows a schedule, and that both places give the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmp import amp
from fastmp.data.mixup import Mixup
from fastmp.schedule import Constant, Cyclic, OneCycle
from fastmp.training import cuda_graph, log
from tests.training.test_trainer import Poison, batches, small_model, trainer_for, weights

CYCLIC = Cyclic(0.01, 0.1, 3, base_momentum=0.8, max_momentum=0.9)


class Unsized:
    """A loader without a length."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def run(schedule, *, sized=True, momentum=0.9, epochs=2):
    """A run with a skipped step; its trainer."""
    model = small_model()
    model.append(Poison({3}))
    scaler = amp.GradScaler("cpu", init_scale=64.0)
    trainer = trainer_for(model, schedule=schedule, scaler=scaler, momentum=momentum)
    loader = batches(5)
    trainer.fit(loader if sized else Unsized(loader), batches(1), epochs)
    assert int(trainer.optimizer.skipped_steps) == 1
    return trainer


@pytest.fixture
def places(monkeypatch):
    """Where the schedule is at every step."""
    seen = []
    step = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "zero_grad",
        lambda self, *args: (seen.append(self._schedule is not None), step(self, *args))[1],
    )
    return seen


@pytest.mark.parametrize("schedule", [OneCycle(0.1, 10), CYCLIC, lambda k: (0.1 / (k + 1), None)])
def test_device_and_host_give_the_same_bits(schedule, places):
    """Of weights, states and the groups that a checkpoint holds."""
    device = run(schedule)
    assert places == [True] * 10
    places.clear()
    host = run(lambda k: schedule(k), sized=False)
    assert places == [False] * 10
    assert torch.equal(weights(device.model), weights(host.model))
    one, two = (trainer.optimizer.state_dict() for trainer in (device, host))
    assert one["param_groups"] == two["param_groups"]
    assert one["param_groups"][0]["lr"] == schedule(8)[0]  # the last of 9 applied steps
    for index, state in one["state"].items():
        assert all(torch.equal(value, two["state"][index][key]) for key, value in state.items())


def test_a_schedule_may_be_defined_for_the_steps_of_the_run_only():
    lrs = [0.1, 0.05, 0.02, 0.01]
    trainer = trainer_for(small_model(), schedule=lambda k: (lrs[k], None), accumulate=3)
    trainer.fit(batches(5), batches(1), 2)
    assert trainer.step == 4


@pytest.mark.parametrize("schedule", [CYCLIC, OneCycle(0.1, 20)])
def test_steps_after_a_run_go_on_with_the_schedule(tmp_path, schedule):
    trainer = trainer_for(small_model(), schedule=schedule, folder=tmp_path)
    trainer.fit(batches(5), batches(1), 1)
    for batch in batches(2):
        trainer.train_step([batch])
    trainer.fit(batches(5), batches(1), 1)
    rows = log.read(tmp_path / log.FILE, "step")
    assert [row["lr"] for row in rows] == [schedule(k)[0] for k in range(12)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_without_momentum_at_some_steps_is_torchs(momentum):
    """There torch neither reads nor writes the buffer, which no table can say."""
    schedule = OneCycle(0.1, 9, 1 / 3, base_momentum=0.0, max_momentum=0.9)
    assert 0.0 in [schedule(k)[1] for k in range(9)]
    model = small_model()
    trainer_for(model, schedule=schedule, momentum=momentum).fit(batches(9), batches(1), 1)
    expected = small_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=momentum)
    for step, (x, y) in enumerate(batches(9)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(expected(x), y).backward()
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"] = schedule(step)
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-5, atol=1e-6)


def test_a_schedule_may_change_between_steps():
    trainer = trainer_for(small_model(), schedule=OneCycle(0.1, 10), momentum=0.5)
    (batch,) = batches(1)
    (group,) = trainer.optimizer.param_groups
    trainer.train_step([batch])
    assert (group["lr"], group["momentum"]) == OneCycle(0.1, 10)(0)
    trainer.schedule = Constant(0.25)
    trainer.train_step([batch])
    assert (group["lr"], group["momentum"]) == (0.25, 0.95)
    trainer.schedule = None
    group["lr"] = 0.0
    before = weights(trainer.model)
    trainer.train_step([batch])
    assert torch.equal(weights(trainer.model), before)


def test_a_table_bound_by_the_user_stays():
    trainer = trainer_for(small_model(), lr=1.0)
    Constant(0.0).bind(trainer.optimizer)
    before = weights(trainer.model)
    trainer.fit(batches(3), batches(1), 1)
    assert torch.equal(weights(trainer.model), before)


# ---- as a graph ----


class Recorder:
    """Stands for ``cuda_graph.Graphed``: runs the step, until a recording fails."""

    fails_at = math.inf

    def __init__(self, step, device, warmup):
        self.step, self.calls = step, 0

    def reset(self):
        self.calls = 0

    def __call__(self, inputs):
        self.calls += 1
        if self.calls == self.fails_at:
            raise cuda_graph.Unsupported("it waits for the device")
        leaves, spec = tree_flatten(inputs)
        return self.step(tree_unflatten(leaves, spec))


def graphed(monkeypatch, loader, schedule, fails_at=math.inf):
    monkeypatch.setattr(Recorder, "fails_at", fails_at)
    monkeypatch.setattr(cuda_graph, "Graphed", Recorder)
    trainer = trainer_for(small_model(), mixup=mixup(), schedule=schedule, cuda_graph=True)
    trainer.fit(loader, batches(1), 2)
    return trainer


def mixup():
    return Mixup(0.4, 0.5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fails_at", [math.inf, 1, 4])
def test_a_recording_that_fails_goes_on_with_kernels(monkeypatch, capsys, fails_at):
    trainer = graphed(monkeypatch, batches(5), CYCLIC, fails_at)
    expected = trainer_for(small_model(), mixup=mixup(), schedule=CYCLIC)
    expected.fit(batches(5), batches(1), 2)
    assert torch.equal(weights(trainer.model), weights(expected.model))
    assert trainer.step == int(trainer.optimizer.applied_steps) == 10
    assert trainer._step_fn.uses_graph == (fails_at == math.inf)
    printed = capsys.readouterr().out
    assert printed.count("no CUDA graph: it waits for the device") == (fails_at != math.inf)


def test_a_schedule_of_unknown_length_is_no_graph(monkeypatch, capsys):
    graphed(monkeypatch, Unsized(batches(5)), CYCLIC)
    assert "no CUDA graph: the schedule has no table" in capsys.readouterr().out
    trainer = graphed(monkeypatch, Unsized(batches(5)), OneCycle(0.1, 10))
    assert trainer._step_fn.uses_graph
