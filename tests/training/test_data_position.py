"""Resuming in the middle of an epoch, with loaders of torch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from fastmp.training import data_position, rng

CPU = torch.device("cpu")


class Noisy(torch.utils.data.Dataset):
    """Every sample draws from all global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()])  # noqa: NPY002


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def loader_with(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(Noisy(), 4, shuffle=True, generator=generator)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("done", [0, 1, 7, 10])
def test_the_rest_of_the_epoch_and_the_next_are_the_same(own_generator, done):
    def rest(loader, start, skip):
        """Batches and a draw after each: the rest of the first epoch, and the second."""
        seen = []
        for epoch in (0, 1):
            if epoch:
                start, skip = data_position.begin(loader, epoch, CPU), 0
            batches = data_position.batches(loader, skip, start, CPU)
            seen.extend((batch, torch.rand(())) for batch in batches)
        return seen

    seed(1)
    loader = loader_with(own_generator)
    undisturbed = rest(loader, data_position.begin(loader, 0, CPU), 0)

    seed(1)
    loader = loader_with(own_generator)
    start = data_position.begin(loader, 0, CPU)
    if done:
        iterator = data_position.batches(loader, 0, start, CPU)
        for _ in range(done):
            next(iterator)
            torch.rand(())
    state, own = rng.state(CPU), data_position.own_state(loader)

    seed(99)  # another process
    other = loader_with(own_generator)
    rng.restore(state, CPU)
    data_position.restore_own_state(other, own)
    resumed = rest(other, start, done)
    assert len(resumed) == len(undisturbed) - done
    for (a, x), (b, y) in zip(resumed, undisturbed[done:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_all_generators_are_restored():
    state = rng.state(CPU)
    first = (torch.rand(3), random.random(), np.random.rand(3), np.random.randn())  # noqa: NPY002
    rng.restore(state, CPU)
    again = (torch.rand(3), random.random(), np.random.rand(3), np.random.randn())  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert (first[2] == again[2]).all()
    assert first[3] == again[3]


def test_a_distributed_sampler_gets_the_epoch():
    data = TensorDataset(torch.arange(12))
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    loader = DataLoader(data, 2, sampler=sampler)
    data_position.begin(loader, 3, CPU)
    assert sampler.epoch == 3


def test_a_random_samplers_generator_is_kept():
    data = TensorDataset(torch.arange(12))
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(data, 3, sampler=RandomSampler(data, generator=generator))
    start = data_position.begin(loader, 0, CPU)
    expected = [batch[0].tolist() for batch in loader]
    rest = [batch[0].tolist() for batch in data_position.batches(loader, 2, start, CPU)]
    assert rest == expected[2:]
