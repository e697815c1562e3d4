"""The order of samples: a function of seed, epoch and rank, from whatever batch on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmp import data
from fastmp.data import Arrays


def numbered(count):
    """Images whose every pixel and label is their number."""
    labels = torch.arange(count)
    return Arrays(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone(), labels)


def seen(loader, epoch=0):
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
    ranks = [seen(loader, epoch) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in ranks]
    flat = [label for batches in ranks for labels in batches for label in labels]
    assert len(flat) == len(set(flat))  # never twice
    if not shuffle:
        assert flat == list(range(samples))
        return
    assert len({len(batches) for batches in ranks}) == 1  # or a collective would wait for ever
    left_out = samples - len(flat)
    assert left_out < batch * world
    assert (left_out == 0) == (samples < batch * world or samples % (batch * world) == 0)


@pytest.mark.parametrize("epoch", [0, 3])
def test_two_ranks_see_what_one_with_twice_the_batch_sees(epoch):
    source = numbered(100)
    whole = seen(data.loader(source, 12, shuffle=True, seed=9), epoch)
    parts = [
        seen(data.loader(source, 6, shuffle=True, seed=9, rank=rank, world=2), epoch)
        for rank in (0, 1)
    ]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole


def test_epochs_and_seeds_have_orders_of_their_own():
    source = numbered(64)
    loader = data.loader(source, 8, shuffle=True, seed=1)
    assert seen(loader, 0) == seen(loader, 0)
    assert seen(loader, 0) != seen(loader, 1)
    assert seen(loader, 1) != seen(data.loader(source, 8, shuffle=True, seed=2), 1)


@given(first=st.integers(0, 8))
def test_an_epoch_can_begin_at_any_batch_once(first):
    loader = data.loader(numbered(64), 8, shuffle=True)
    whole = seen(loader)
    loader.start_at(first)
    assert seen(loader) == whole[first:]
    assert seen(loader) == whole


def test_the_order_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seen(data.loader(numbered(20), 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_loaders():
    with pytest.raises(ValueError, match=r"as many labels as images.* 5 images and 4 labels"):
        Arrays(torch.zeros(5, 1, 2, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one, got 0 images"):
        Arrays(torch.zeros(0, 1, 2, 2), torch.zeros(0))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.loader(numbered(3), 0, shuffle=False)
    with pytest.raises(ValueError, match="a sample for each of 4 ranks, got 3 samples"):
        data.loader(numbered(3), 2, shuffle=True, world=4)
