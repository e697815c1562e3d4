"""The order of samples: a function of seed, epoch and rank, from any batch on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmp import data
from fastmp.data import Arrays


def numbered(count):
    """Images whose pixels and label equal their index."""
    labels = torch.arange(count)
    return Arrays(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), labels)


def labels_of(loader, epoch=0):
    loader.set_epoch(epoch)
    return [labels.tolist() for _, labels in loader]


def test_evaluation_has_every_sample_once_in_order():
    batches = list(data.loader(numbered(10), 4, shuffle=False))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 0, 0].long(), labels)


@given(
    samples=st.integers(1, 90),
    batch=st.integers(1, 20),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_samples(samples, batch, world, shuffle, epoch):
    if shuffle and samples < world:
        return
    source = numbered(samples)
    loaders = [
        data.loader(source, batch, shuffle=shuffle, rank=rank, world=world, seed=5)
        for rank in range(world)
    ]
    ranks = [labels_of(loader, epoch) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in ranks]
    flat = [label for batches in ranks for labels in batches for label in labels]
    assert len(flat) == len(set(flat))  # no sample twice
    if not shuffle:
        assert flat == list(range(samples))
        return
    assert len({len(batches) for batches in ranks}) == 1  # unequal numbers block a collective
    left_out = samples - len(flat)
    assert left_out < batch * world
    assert (left_out == 0) == (samples < batch * world or samples % (batch * world) == 0)


@pytest.mark.parametrize("epoch", [0, 3])
def test_two_ranks_have_the_batches_of_one_with_twice_the_batch_size(epoch):
    source = numbered(100)
    whole = labels_of(data.loader(source, 12, shuffle=True, seed=9), epoch)
    parts = [
        labels_of(data.loader(source, 6, shuffle=True, seed=9, rank=rank, world=2), epoch)
        for rank in (0, 1)
    ]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole


def test_every_epoch_and_seed_has_its_order():
    source = numbered(64)
    loader = data.loader(source, 8, shuffle=True, seed=1)
    assert labels_of(loader, 0) == labels_of(loader, 0)
    assert labels_of(loader, 0) != labels_of(loader, 1)
    assert labels_of(loader, 1) != labels_of(data.loader(source, 8, shuffle=True, seed=2), 1)


@given(first=st.integers(0, 8))
def test_an_epoch_can_begin_at_any_batch_once(first):
    loader = data.loader(numbered(64), 8, shuffle=True)
    whole = labels_of(loader)
    loader.start_at(first)
    assert labels_of(loader) == whole[first:]
    assert labels_of(loader) == whole


def test_the_order_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    labels_of(data.loader(numbered(20), 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_loaders():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.loader(numbered(3), 0, shuffle=False)
    with pytest.raises(ValueError, match="a sample for each of 4 ranks, got 3 samples"):
        data.loader(numbered(3), 2, shuffle=True, world=4)
