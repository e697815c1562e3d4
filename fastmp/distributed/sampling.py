"""Loaders that know nothing of ranks, split over them: each rank its own batches.

Rank 0 draws the order of an epoch and the others follow it, whatever the sampler and its generator
are. Training: rank r of n has batches r, r + n, ..., as many as every other rank. Evaluation: the
same, and the last ones go to the first ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fastmp.data.loader import Loader
from fastmp.distributed.rendezvous import World

MIN_SAMPLES = 2  # of a batch made from a remainder: batch norms cannot train on one


class RankBatches:
    """This rank's part of a sampler's batches; other attributes are the sampler's.

    Args:
        sampler: iterable over batches of indices, or single indices.
        world: the ranks; all of them must iterate.
        training: equally many batches on all ranks. Without ``drop_last`` the samples that remain
            make one more batch for every rank, if they are enough.

    Raises:
        ValueError: training with fewer batches than ranks.
    """

    def __init__(self, sampler: Any, world: World, *, training: bool) -> None:
        self._sampler, self._world, self._training = sampler, world, training
        if training and len(self) == 0:
            raise ValueError(
                f"expected a batch for each of {world.size} ranks, the loader has {len(sampler)}: "
                "take a smaller batch size, which is that of one rank"
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet set: while it is copied
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        count, size = len(self._sampler), self._world.size
        if self._training:
            return count // size + self._splits_rest()
        return (count - self._world.rank + size - 1) // size

    def __iter__(self) -> Iterator[Any]:
        rank, size = self._world.rank, self._world.size
        order = self._world.broadcast_object(self._draw() if rank == 0 else None)
        if not self._training:
            yield from order[rank::size]
            return
        whole = len(order) // size * size
        yield from order[rank:whole:size]
        if self._splits_rest():
            rest = [index for batch in order[whole:] for index in batch]
            first, last = (len(rest) * r // size for r in (rank, rank + 1))
            yield rest[first:last]

    def _draw(self) -> list[Any]:
        """The sampler's epoch: as many as it says, and some have no end."""
        drawn = iter(self._sampler)
        order = list(islice(drawn, len(self._sampler)))
        next(drawn, None)  # torch's draw from their generator once more, at their end
        return order

    def _splits_rest(self) -> bool:
        """Whether the last batches, fewer than ranks, are split sample by sample."""
        sampler, size = self._sampler, self._world.size
        if type(sampler) is not BatchSampler or sampler.drop_last:
            return False
        used = len(sampler) // size * size * sampler.batch_size
        return len(sampler.sampler) - used >= MIN_SAMPLES * size  # type: ignore[arg-type]


class Splitter:
    """Splits loaders over the ranks, each one once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._made: dict[tuple[int, bool], tuple[Any, Any]] = {}

    def __call__(self, loader: Iterable[Any], *, training: bool) -> Iterable[Any]:
        """``loader`` itself if it is split already, or if nothing is known of it.

        Split are ``DataLoader`` over a data set with indices, and loaders of ``fastmp.data``. All
        else of a loader stays: batch size (now that of one rank), workers, ``collate_fn``, seeds.

        Raises:
            ValueError: training with fewer batches than ranks, or a loader for other ranks.
        """
        if self._world.size == 1:
            return loader
        key = id(loader), training
        if key not in self._made:  # the loader is kept: its id is no other's
            self._made[key] = (loader, self._split(loader, training))
        split: Iterable[Any] = self._made[key][1]
        return split

    def _split(self, loader: Any, training: bool) -> Any:
        world = self._world
        if isinstance(loader, Loader):
            return loader.for_rank(world.rank, world.size)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        batches = getattr(loader, name)
        try:
            few = len(batches) < world.size
        except TypeError:  # a sampler that may have no end
            return loader
        if few and not training:  # shards need a batch on every rank
            return loader
        if any(map(_is_split, (batches, getattr(batches, "sampler", None)))):
            return loader
        split = copy.copy(loader)
        split._iterator = None
        # DataLoader refuses assignment: its parts were checked together. They still fit.
        object.__setattr__(split, name, RankBatches(batches, world, training=training))
        return split


def _is_split(sampler: Any) -> bool:
    """Whether a sampler knows of ranks: torch's and timm's name them so, Accelerate's second."""
    return any(getattr(sampler, name, 1) > 1 for name in ("num_replicas", "num_processes"))
