"""The range test: its curve, its end, its suggestion, and the restored trainer."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastmp
from fastmp import schedule
from fastmp.nn import CrossEntropyLoss
from fastmp.optim import lr_scheduler
from fastmp.report import lr_curve
from fastmp.training import lr_find, rng
from fastmp.training.lr_find import Finding
from fastmp.training.trainer import RunStopped, Trainer

CPU = torch.device("cpu")


def noisy_blobs(count=256, classes=4):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + 0.5 * torch.randn(count, 8, generator=generator), labels


def batches(size=32):
    images, labels = noisy_blobs()
    return list(zip(images.split(size), labels.split(size), strict=True))


def tiny_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(16, 4),
    )


class Plain:
    """A minimal trainer for ``find``: a real model, a real fastmp optimizer, a plain loop.

    Its state shares memory with model and optimizer, as that of torch's modules does.
    """

    accumulate = 1
    schedule = schedule.Constant(0.125)

    def __init__(self, optimizer=fastmp.optim.SGD, stop=None, spoil=(), **options):
        self.model = tiny_model()
        self.optimizer = optimizer(self.model.parameters(), lr=0.1, **options)
        self.criterion = CrossEntropyLoss()
        self.seen, self.groups, self.stop, self.spoil = [], [], stop, spoil

    def state_dict(self):
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "rng": rng.state(CPU)}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        rng.restore(state["rng"], CPU)

    def train_step(self, group):
        if self.stop is not None and len(self.seen) == self.stop:
            raise RunStopped("cannot go on")
        self.optimizer.zero_grad()
        losses = [self.criterion(self.model(images), labels) for images, labels in group]
        loss = torch.stack(losses).mean()
        loss.backward()
        if len(self.seen) in self.spoil:
            self.model[0].weight.grad[0] = math.nan
        lr, momentum = self.schedule(int(self.optimizer.applied_steps))
        lr_scheduler.apply(self.optimizer, lr, momentum)
        self.optimizer.step()
        self.seen.append((lr, momentum))
        self.groups.append(group)
        self.loss = loss.item()

    def last_loss(self):
        return self.loss


def full(**options):
    model = tiny_model()
    optimizer = fastmp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(
        model,
        optimizer,
        CrossEntropyLoss(),
        schedule=schedule.Constant(0.125),
        progress=False,
        **options,
    )


def everything(trainer):
    """A copy of everything that a test could change."""
    own = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "trainer": trainer.state_dict(),
        "rng": rng.state(CPU),
        "next": (random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }
    return copy.deepcopy(own)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- the curve ----


def test_every_rate_once_from_low_to_high_with_the_momentum_left_alone():
    trainer = Plain(momentum=0.9)
    found = lr_find.find(trainer, batches(), low=1e-6, high=1e-2, steps=9)
    assert found.lrs == pytest.approx(np.geomspace(1e-6, 1e-2, 9).tolist())
    assert trainer.seen == [(lr, None) for lr in found.lrs]
    assert len(found.losses) == len(found.smoothed) == 9


def test_the_rate_rises_after_a_skipped_step():
    trainer = Plain(spoil=(2, 3, 5))
    found = lr_find.find(trainer, batches(), steps=12, high=1e-2)
    assert trainer.seen == [(lr, None) for lr in found.lrs]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_the_average_is_exponential_and_bias_corrected(smoothing):
    found = lr_find.find(Plain(), batches(), steps=20, high=0.1, smoothing=smoothing)
    for k, got in enumerate(found.smoothed):
        weights = [smoothing ** (k - i) for i in range(k + 1)]
        mean = sum(w * x for w, x in zip(weights, found.losses, strict=False)) / sum(weights)
        assert got == pytest.approx(mean, rel=1e-12)


def test_the_losses_are_those_of_a_plain_loop():
    found = lr_find.find(Plain(), batches(), low=1e-3, high=1.0, steps=15)
    trainer = Plain()
    loop = batches()
    for k, (lr, loss) in enumerate(zip(found.lrs, found.losses, strict=True)):
        trainer.schedule = schedule.Constant(lr)
        trainer.train_step([loop[k % len(loop)]])
        assert trainer.loss == loss


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_are_repeated_and_grouped_as_the_trainer_would(accumulate):
    trainer = Plain()
    trainer.accumulate = accumulate
    given = batches()[:4]
    lr_find.find(trainer, given, steps=7, high=1e-3)
    seen = [images for group in trainer.groups for images, _ in group]
    assert [len(group) for group in trainer.groups] == [accumulate] * 7
    assert all(images is given[i % 4][0] for i, images in enumerate(seen))


# ---- its end ----


def test_stops_when_the_smoothed_loss_is_four_times_its_best():
    found = lr_find.find(Plain(momentum=0.9), batches(), high=1e4, steps=100)
    assert 20 < len(found.lrs) < 100
    assert found.smoothed[-1] > 4 * min(found.smoothed)
    assert found.smoothed[-2] <= 4 * min(found.smoothed[:-1])


@pytest.mark.parametrize("how", ["nan", "inf", "stopped"])
def test_stops_when_the_loss_is_not_finite_or_the_trainer_stops(how):
    given = batches()
    if how != "stopped":
        given[5] = (given[5][0] * float(how), given[5][1])
    found = lr_find.find(Plain(stop=5 if how == "stopped" else None), given, steps=30)
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) == 5
    assert all(map(math.isfinite, found.losses))


# ---- the restored trainer ----


@pytest.mark.parametrize("ending", ["high", "diverged", "error"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", [Plain, full], ids=["plain", "trainer"])
def test_leaves_no_trace(make, warm, ending):
    trainer = make()
    if warm:
        for batch in batches()[:3]:
            trainer.train_step([batch])
        trainer.last_loss()
    torch.manual_seed(11)
    loader = DataLoader(TensorDataset(*noisy_blobs()), 32, shuffle=True)
    given = iter(loader) if ending == "error" else loader
    before = everything(trainer)
    wanted = trainer.schedule
    try:
        lr_find.find(trainer, given, high=1e5 if ending == "diverged" else 1.0, steps=40)
    except ValueError:
        assert ending == "error"  # an iterator cannot be repeated
    assert trainer.schedule is wanted
    assert same(everything(trainer), before)


def test_the_trainer_and_a_plain_loop_find_the_same():
    found = [
        lr_find.find(trainer, batches(), high=1e3, steps=60)
        for trainer in (Plain(momentum=0.9), full())
    ]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert found[0].suggestion == found[1].suggestion


# ---- the suggestion ----


def curve(losses, settled=0):
    lrs = np.geomspace(1e-4, 1.0, len(losses)).tolist()
    return Finding(tuple(lrs), tuple(losses), tuple(losses), settled)


def test_suggests_the_steepest_descent_before_the_minimum():
    losses = [2.0, 2.0, 1.9, 1.7, 1.1, 0.9, 0.8, 1.5, 3.0, 0.85]  # the last fall is after it
    found = curve(losses)
    assert found.suggestion == found.lrs[4]  # from 1.7 to 0.9
    assert found.at_minimum == found.lrs[6]


def test_the_first_losses_of_the_average_are_not_read():
    found = curve([5.0, 3.0, 2.0, 1.9, 1.7, 1.2, 1.15, 4.0], settled=3)
    assert found.suggestion == found.lrs[4]


def test_a_loss_that_never_falls_has_no_suggestion():
    assert math.isnan(curve([1.0, 1.0, 2.0, 3.0]).suggestion)


@pytest.mark.parametrize("optimizer", [fastmp.optim.SGD, fastmp.optim.AdamW])
def test_the_suggestion_trains_well(optimizer):
    """Against the same number of steps at a hundredth and at a hundred times of it."""
    found = lr_find.find(Plain(optimizer), batches(), high=1e3)
    ends = []
    for lr in (found.suggestion, found.suggestion / 100, found.suggestion * 100):
        trainer = Plain(optimizer)
        trainer.schedule = schedule.OneCycle(lr, 40, base_momentum=None, max_momentum=None)
        for k in range(40):
            trainer.train_step([batches()[k % 8]])
        ends.append(torch.stack([trainer.criterion(trainer.model(x), y) for x, y in batches()]))
    good, slow, wild = (float(end.detach().mean()) for end in ends)
    assert good < 0.5 * slow
    assert good < 0.8 * wild


# ---- the picture ----


@pytest.mark.parametrize("falls", [True, False])
def test_draws_a_picture(tmp_path, falls):
    found = curve([2.0, 1.9, 1.0, 0.9, 4.0] if falls else [1.0, 2.0, 3.0, 4.0])
    path = lr_curve.draw(found, tmp_path / "curve")
    assert path == tmp_path / "curve"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "expected 0 < low < high, both finite, got low=0.0"),
        ({"low": 1.0, "high": 0.5}, "got low=1.0, high=0.5"),
        ({"high": math.inf}, "got low=1e-07, high=inf"),
        ({"steps": 2}, "steps must be at least 3, got 2"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lr_find.find(Plain(), batches(), **options)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match=r"expected \(images, labels\) pairs, got none"):
        lr_find.find(Plain(), [])
    with pytest.raises(ValueError, match="an exhausted iterator: pass the iterable itself"):
        lr_find.find(Plain(), iter(batches()), high=1e-3)


def test_a_loss_that_is_bad_from_the_start_is_refused():
    bad = [(images * math.nan, labels) for images, labels in batches()]
    trainer = Plain()
    before = everything(trainer)
    with pytest.raises(ValueError, match="diverged at step 1, with lr 1e-07: look for bad values"):
        lr_find.find(trainer, bad)
    assert same(everything(trainer), before)
