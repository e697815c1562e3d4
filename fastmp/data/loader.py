"""Batches in an order that is a function of seed, epoch and rank, so a resumed run saves none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastmp.data.dataset import Arrays, DataError, Source

Batch = tuple[Tensor, Tensor]
_GPU_MEMORY_FRACTION = 1 / 4  # of the free memory, for a data set


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

    With ``shuffle`` (training) an epoch consists of global batches of ``batch_size * world``, split
    over the ranks: a step of two ranks has the samples of one rank with twice the batch size. The
    last partial batch is dropped, unless the epoch has no other. Without ``shuffle`` (evaluation)
    every sample comes once, in order, on one of the ranks.

    Args:
        source: the training or the test source of a data set.
        batch_size: samples per batch and rank.
        shuffle: for training.
        seed: of the order and of the augmentation of image files.
        rank, world: this process's rank and the number of ranks.
        workers: background processes that prepare batches; unused for sources in memory.
        device: of the training. A source in memory that fits on a GPU is moved there, once;
            otherwise batches for a GPU are in pinned memory.

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
    return source.images.nbytes + source.labels.nbytes <= free * _GPU_MEMORY_FRACTION


class _Order:
    """The indices of every batch of a rank."""

    def __init__(
        self, samples: int, batch_size: int, shuffle: bool, seed: int, rank: int, world: int
    ) -> None:
        self.samples, self.batch_size, self.shuffle = samples, batch_size, shuffle
        self.seed, self.rank, self.world = seed, rank, world

    def seed_of(self, epoch: int) -> int:
        """The seed of an epoch's order and augmentation."""
        return (self.seed * 1_000_003 + epoch) % 2**63

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of each batch."""
        if not self.shuffle:
            first, last = (self.samples * r // self.world for r in (self.rank, self.rank + 1))
            return _cut(list(range(first, last)), self.batch_size)
        generator = torch.Generator().manual_seed(self.seed_of(epoch))
        order = torch.randperm(self.samples, generator=generator, device="cpu").tolist()
        global_batch = self.batch_size * self.world
        if self.samples < global_batch:  # a single partial batch, split as evenly as possible
            first, last = (self.samples * r // self.world for r in (self.rank, self.rank + 1))
            return [order[first:last]]
        whole = order[: self.samples // global_batch * global_batch]
        parts = _cut(whole, self.batch_size)
        return parts[self.rank :: self.world]


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


class Loader:
    """An iterable over the batches of an epoch, made by ``loader``.

    ``order`` gives the indices of each batch in ``source``; ``workers`` processes prefetch, into
    ``pinned`` memory for a GPU.
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
            global_batch = self.batch_size * self._order.world
            return max(1, len(self.source) // global_batch)
        return len(self._order.batches(0))

    def for_rank(self, rank: int, world: int) -> Loader:
        """The part of one rank of a loader that was made without ``rank`` and ``world``.

        A loader that was made for ``world`` ranks is returned as it is.

        Raises:
            ValueError: it was made for another number of ranks, or has too few samples.
        """
        old = self._order
        if old.world == world:
            return self
        if old.world != 1:
            raise ValueError(f"the loader was made for {old.world} ranks, and {world} train")
        if old.shuffle and old.samples < world:
            raise ValueError(
                f"expected a sample for each of {world} ranks, got {old.samples} samples"
            )
        order = _Order(old.samples, old.batch_size, old.shuffle, old.seed, rank, world)
        part = Loader(self.source, order, self._workers, self._pinned)
        part.set_epoch(self._epoch)
        return part

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, of the next iterations; each epoch has its own order."""
        self._epoch = epoch

    def start_at(self, batch: int) -> None:
        """Start the next iteration, and only that one, at this batch."""
        self._first = batch

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        seed = self._order.seed_of(self._epoch) if self._order.shuffle else None
        wanted = [(indices, seed) for indices in self._order.batches(self._epoch)[first:]]
        if not self._pinned and self._workers == 0:
            return (self.source.batch(*request) for request in wanted)
        return _unless_failed(
            DataLoader(
                _Requests(self.source),
                batch_size=None,
                sampler=wanted,
                num_workers=self._workers,
                pin_memory=self._pinned,
                generator=torch.Generator(),  # without one it draws from the global generator
            )
        )


def _unless_failed(results: Iterable[Batch | DataError]) -> Iterator[Batch]:
    for result in results:
        if isinstance(result, DataError):
            raise result
        yield result


class _Requests(torch.utils.data.Dataset[Batch | DataError]):
    """A source as a map-style data set: (indices, seed) to a batch.

    Errors of the data are handed on as values: torch would put a worker's traceback into them.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, request: tuple[Sequence[int], int | None]) -> Batch | DataError:
        try:
            return self._source.batch(*request)
        except DataError as error:
            return error
