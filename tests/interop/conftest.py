"""What the loops of others train here: a small classifier on points, easy enough to be learnt."""

import pytest
import torch
from torch import nn

import fastmp

CLASSES, FEATURES = 3, 12


class Points(torch.utils.data.Dataset):
    """Gaussian clouds around one corner for each class."""

    def __init__(self, dtype=torch.bfloat16):
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
def points():
    return Points()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fastmp.convert(Classifier(), torch.bfloat16)


@pytest.fixture
def optimizer(model):
    return fastmp.optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)


def accuracy(model, points):
    with torch.no_grad():
        return float((model(points.points).argmax(1) == points.labels).float().mean())
