"""The training step: where it follows a schedule, and that both places give the same bits."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.utils._pytree import tree_unflatten

import fastmp
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
    """Stands for ``cuda_graph.CudaRecorder``: a replay runs the step, until a recording fails."""

    fails_at = math.inf

    def __init__(self, device):
        self.calls, self.captures = 0, 0

    def new_pool(self):
        pass

    def stream(self):
        return contextlib.nullcontext()

    def run(self, step, inputs):
        self.calls += 1
        return step(inputs)

    def watch(self, step, inputs):
        outputs = self.run(step, inputs)
        return outputs, "it waits for the device" if self.calls + 1 == self.fails_at else ""

    def capture(self, step, leaves, spec):
        self.captures += 1
        if self.calls + self.captures >= self.fails_at:
            raise cuda_graph.Unsupported("it cannot be captured")
        return lambda leaves: step(tree_unflatten(leaves, spec))


def graphed(monkeypatch, loader, schedule, fails_at=math.inf):
    monkeypatch.setattr(Recorder, "fails_at", fails_at)
    monkeypatch.setattr(cuda_graph, "CudaRecorder", Recorder)
    trainer = trainer_for(small_model(), mixup=mixup(), schedule=schedule, cuda_graph=True)
    trainer.fit(loader, batches(1), 2)
    return trainer


def mixup():
    return Mixup(0.4, 0.5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fails_at", [math.inf, 4, 5])
def test_a_recording_that_fails_goes_on_with_kernels(monkeypatch, capsys, fails_at):
    trainer = graphed(monkeypatch, batches(5), CYCLIC, fails_at)
    expected = trainer_for(small_model(), mixup=mixup(), schedule=CYCLIC)
    expected.fit(batches(5), batches(1), 2)
    assert torch.equal(weights(trainer.model), weights(expected.model))
    assert trainer.step == int(trainer.optimizer.applied_steps) == 10
    assert trainer._step_fn.uses_graph == (fails_at == math.inf)
    printed = capsys.readouterr().out
    assert printed.count("no CUDA graph: it ") == (fails_at != math.inf)


def test_a_schedule_of_unknown_length_is_no_graph(monkeypatch, capsys):
    graphed(monkeypatch, Unsized(batches(5)), CYCLIC)
    assert "no CUDA graph: the schedule has no table" in capsys.readouterr().out
    trainer = graphed(monkeypatch, Unsized(batches(5)), OneCycle(0.1, 10))
    assert trainer._step_fn.uses_graph


# ---- parts of a batch ----


class Margin(torch.nn.Module):
    """A loss that says nothing of its divisor: a mean over samples."""

    def forward(self, logits, labels):
        return torch.nn.functional.multi_margin_loss(logits.float(), labels)


def one_batch(size, dtype=torch.float32):
    ((images, labels),) = batches(1, size, dtype)
    labels[-1] = 1
    return images, labels


def parts_of(batch, sizes):
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


def step_with(group, criterion, dtype=torch.float32, **options):
    model = small_model(dtype)
    trainer = trainer_for(model, lr=1.0, momentum=0.0, criterion=criterion, accumulate=9, **options)
    trainer.train_step(group)
    return trainer, torch.cat([value.flatten() for value in trainer.optimizer.masters()])


@pytest.mark.parametrize("sizes", [(5, 1), (1, 5), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "criterion",
    [
        fastmp.nn.CrossEntropyLoss(),
        fastmp.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]), ignore_index=1),
        fastmp.nn.CrossEntropyLoss(reduction="sum"),
        torch.nn.CrossEntropyLoss(ignore_index=1),
        Margin(),
    ],
    ids=repr,
)
def test_parts_of_a_batch_train_as_the_batch(criterion, dtype, sizes):
    batch = one_batch(6, dtype)
    scaler = amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
    whole, expected = step_with([batch], criterion, dtype, scaler=scaler)
    unscaled = amp.GradScaler("cpu", init_scale=1.0, enabled=dtype == torch.float16)
    trainer, found = step_with(parts_of(batch, sizes), criterion, dtype, scaler=unscaled)
    eps = torch.finfo(dtype).eps
    assert (found - expected).norm() <= 2 * eps * expected.norm()
    assert trainer.last_loss() == pytest.approx(whole.last_loss(), rel=4 * eps)


def test_equal_parts_give_the_bits_of_their_mean():
    """What accumulation did before parts had weights."""
    group, scale = batches(3, 4), torch.tensor(3.0e3)
    scaler = amp.GradScaler("cpu", init_scale=float(scale))
    _, found = step_with(group, fastmp.nn.CrossEntropyLoss(), scaler=scaler)
    model = small_model()
    optimizer = fastmp.optim.SGD(model.parameters(), 1.0)
    for images, labels in group:
        loss = fastmp.nn.CrossEntropyLoss()(model(images), labels, grad_scale=scale / 3)
        (loss * (scale / 3)).backward()
    optimizer.step_context.grad_scale = scale
    optimizer.step()
    assert torch.equal(found, weights(model))


def test_mixed_parts_of_unequal_sizes_are_weighted():
    """Each part draws its own mixture; classes are counted before it, for it permutes them."""
    criterion = fastmp.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]))
    group = parts_of(one_batch(6), (4, 2))
    _, found = step_with(group, criterion, mixup=mixup())
    model, twin = small_model(), mixup()
    counts = [float(criterion.weight[labels].sum()) for _, labels in group]
    for (images, labels), count in zip(group, counts, strict=True):
        inputs, target = twin(images, labels)
        (criterion(model(inputs), target) * (count / sum(counts))).backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_sample", [False, True])
def test_pasted_label_maps_are_weighted_as_they_are_after_it(per_sample):
    """A box moves ignored pixels and others between the samples."""

    class Pixels(torch.nn.Conv2d):
        def __init__(self):
            super().__init__(1, 3, 1)

    def mix():
        generator = torch.Generator().manual_seed(3)
        return Mixup(0.0, 1.0, per_sample=per_sample, generator=generator)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (6, 4, 4), generator=generator)
    group = parts_of((images, labels), (4, 2))
    criterion = fastmp.nn.CrossEntropyLoss(ignore_index=1)
    torch.manual_seed(0)
    model, twin, mixed = Pixels(), Pixels(), mix()
    twin.load_state_dict(model.state_dict())
    trainer = trainer_for(
        model, lr=1.0, momentum=0.0, criterion=criterion, accumulate=2, mixup=mix()
    )
    trainer.train_step(group)
    inputs, targets = zip(*(mixed(*part) for part in group), strict=True)
    criterion(twin(torch.cat(inputs)), torch.cat([target.a for target in targets])).backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in twin.parameters()])
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)
