"""A small classifier on points in clusters, trained by the loops of other libraries."""

import pytest
import torch
from torch import nn

import fastmp

CLASSES, FEATURES = 3, 12


class Points(torch.utils.data.Dataset):
    """Gaussian clouds around one corner for each class."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(240) % CLASSES
        corners = 3 * torch.randn(CLASSES, FEATURES, generator=generator)
        noise = torch.randn(240, FEATURES, generator=generator)
        self.points = (corners[self.labels] + noise).to(dtype)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index], self.labels[index]


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, CLASSES))


@pytest.fixture
def dtype():
    return torch.bfloat16


@pytest.fixture
def points(dtype):
    return Points(dtype)


@pytest.fixture
def model(dtype):
    torch.manual_seed(0)
    return fastmp.convert(Classifier(), dtype)


@pytest.fixture
def optimizer(model):
    return fastmp.optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)


@pytest.fixture
def scaler():
    """Its first steps overflow in fp16."""
    return fastmp.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)


def accuracy(model, points):
    with torch.no_grad():
        return float((model(points.points).argmax(1) == points.labels).float().mean())


def assert_learnt_over_overflows(model, optimizer, points):
    """Of 30 steps the first are skipped, until the scale is low enough."""
    applied, skipped = int(optimizer.applied_steps), int(optimizer.skipped_steps)
    assert applied + skipped == 30
    assert 5 <= skipped < 15
    assert accuracy(model, points) > 0.95
