"""Batches in an order that is a function of seed, epoch and rank: nothing of it has to be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastmp.data.dataset import Arrays, Source

Batch = tuple[Tensor, Tensor]
_SHARE_OF_MEMORY = 4  # a data set may take a fourth of what is free on a GPU


def loader(
    source: Source,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device | None = None,
) -> Loader:
    """Batches of (images uint8 (n, C, H, W), labels int64 (n,)).

    With ``shuffle`` (training) the epoch is cut into global batches of ``batch_size * world``, of
    which each rank has its part: two ranks see in a step what one with twice the batch would see. A
    last partial one is dropped, unless it is the only one. Without (evaluation) every sample comes
    once, in order, to one of the ranks.

    Args:
        source: one of a data set's.
        batch_size: samples a batch, of one rank.
        shuffle: for training.
        seed: decides the order, and how images from files are cropped.
        rank, world: which process this is, and how many share the samples.
        workers: processes that prepare batches in the background; for sources not in memory.
        device: where training runs. A source in memory that fits on a GPU is moved there, once;
            else batches for a GPU come in pinned memory.

    Raises:
        ValueError: a batch size below 1, or fewer samples than ranks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if shuffle and len(source) < world:
        raise ValueError(f"expected a sample for each of {world} ranks, got {len(source)} samples")
    pinned = False
    if device is not None and device.type == "cuda":
        pinned = not (isinstance(source, Arrays) and _fits(source, device))
        if isinstance(source, Arrays) and not pinned:
            source = source.to(device)
    order = _Order(len(source), batch_size, shuffle, seed, rank, world)
    direct = isinstance(source, Arrays) and not pinned
    return Loader(source, order, 0 if direct else workers, pinned)


def _fits(source: Arrays, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return source.images.nbytes + source.labels.nbytes <= free // _SHARE_OF_MEMORY


class _Order:
    """Which samples are in which batch of this rank."""

    def __init__(
        self, samples: int, batch_size: int, shuffle: bool, seed: int, rank: int, world: int
    ) -> None:
        self.samples, self.batch_size, self.shuffle = samples, batch_size, shuffle
        self.seed, self.rank, self.world = seed, rank, world

    def seed_of(self, epoch: int) -> int:
        """Of all that is random in an epoch."""
        return (self.seed * 1_000_003 + epoch) % 2**63

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of each batch."""
        if not self.shuffle:
            first, last = (self.samples * r // self.world for r in (self.rank, self.rank + 1))
            return _cut(list(range(first, last)), self.batch_size)
        generator = torch.Generator().manual_seed(self.seed_of(epoch))
        order = torch.randperm(self.samples, generator=generator).tolist()
        together = self.batch_size * self.world
        if self.samples < together:  # the only one: as evenly as it goes
            first, last = (self.samples * r // self.world for r in (self.rank, self.rank + 1))
            return [order[first:last]]
        whole = order[: self.samples // together * together]
        parts = _cut(whole, self.batch_size)
        return parts[self.rank :: self.world]


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


class Loader:
    """What ``loader`` returns: iterate over it for the batches of an epoch.

    ``source`` has the images, ``order`` says which of them when; ``workers`` processes read ahead,
    into ``pinned`` memory if a GPU takes them.
    """

    def __init__(self, source: Source, order: _Order, workers: int, pinned: bool) -> None:
        self.source = source
        self.batch_size = order.batch_size
        self._order = order
        self._workers = workers
        self._pinned = pinned
        self._epoch = 0
        self._first = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        if self._order.shuffle:
            together = self.batch_size * self._order.world
            return max(1, len(self.source) // together)
        return len(self._order.batches(0))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch, from 0, the next iterations are; each has an order of its own."""
        self._epoch = epoch

    def start_at(self, batch: int) -> None:
        """Let the next iteration, and only that one, begin at this batch."""
        self._first = batch

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        seed = self._order.seed_of(self._epoch) if self._order.shuffle else None
        wanted = [(indices, seed) for indices in self._order.batches(self._epoch)[first:]]
        if not self._pinned and self._workers == 0:
            return (self.source.batch(*request) for request in wanted)
        return iter(
            DataLoader(
                _Requests(self.source),
                batch_size=None,
                sampler=wanted,
                num_workers=self._workers,
                pin_memory=self._pinned,
                generator=torch.Generator(),  # else it would draw a seed from the global one
            )
        )


class _Requests(torch.utils.data.Dataset[Batch]):
    """A source as torch's loader wants it: a request goes in, a batch comes out."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, request: tuple[Sequence[int], int | None]) -> Batch:
        return self._source.batch(*request)
