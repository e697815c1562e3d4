"""Script for torchrun: loaders that know nothing of ranks, given to the trainer on two ranks.

torchrun --nproc-per-node=2 tests/distributed/loader_ranks.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)

import fastmp
from fastmp.distributed import rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.schedule import OneCycle
from tests.distributed import ranks

CPU = torch.device("cpu")


class Numbered(Dataset):
    """Images whose first pixel is their number."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 1, 3, 4, generator=generator)
        self.images[:, 0, 0, 0] = torch.arange(count)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Stream(IterableDataset):
    """Every ``step``-th sample, from ``start`` on; says that it has ``length``."""

    def __init__(self, count, start=0, step=1, length=None):
        self.samples = list(Numbered(count))[start::step]
        self.length = len(self.samples) if length is None else length

    def __iter__(self):
        return iter(self.samples)

    def __len__(self):
        return self.length


class Net(torch.nn.Module):
    """Writes down which images it saw in training and in evaluation."""

    def __init__(self):
        super().__init__()
        self.layers = ranks.model_in()
        self.seen = {True: [], False: []}

    def forward(self, images):
        self.seen[self.training].append(images[:, 0, 0, 0].int().tolist())
        return self.layers(images / 64)


def trainer_for(**options):
    model = Net()
    optimizer = fastmp.optim.SGD(model.named_parameters(), lr=0.1)
    criterion = fastmp.nn.CrossEntropyLoss()
    return fastmp.Trainer(model, optimizer, criterion, progress=False, **options)


def fit(loader, *, epochs=2, val=None, **options):
    """Batches of every epoch, those of the evaluation, warnings, the error, and the weights."""
    trainer = trainer_for(**options)
    val = val or DataLoader(Numbered(7), 2)
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(loader, val, epochs)
        except (ValueError, RuntimeError) as raised:
            error = str(raised)
    seen = trainer.model.seen
    return {
        "train": seen[True],
        "val": seen[False],
        "warnings": [str(w.message) for w in caught if "ranks" in str(w.message)],
        "error": error,
        "steps": trainer.step,
        "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
    }


def collate(samples):
    images, labels = zip(*reversed(samples), strict=True)
    return torch.stack(images), torch.stack(labels)


def map_style(world):
    torch.manual_seed(world.rank)  # the global generators differ
    data = Numbered(37)
    weights = WeightedRandomSampler([1.0] * 12 + [0.0] * 25, 16)
    batches = BatchSampler(SequentialSampler(data), 6, drop_last=False)
    whole = torch.utils.data.TensorDataset(*(x.unflatten(0, (9, 4)) for x in data[:36]))
    return {
        "shuffled": fit(DataLoader(data, 4, shuffle=True)),
        "workers": fit(
            DataLoader(data, 4, shuffle=True, num_workers=1, collate_fn=collate), epochs=1
        ),
        "drop_last": fit(DataLoader(data, 4, shuffle=True, drop_last=True)),
        "rest": fit(DataLoader(data, 9)),
        "weighted": fit(DataLoader(data, 4, sampler=weights)),
        "batch_sampler": fit(DataLoader(data, batch_sampler=batches)),
        "batch_size None": fit(DataLoader(whole, batch_size=None, shuffle=True)),
        "distributed": fit(DataLoader(data, 4, sampler=DistributedSampler(data))),
        "ours": fit(fastmp.data.loader(ours(37), 4, shuffle=True), val=our_validation()),
        "too few": fit(DataLoader(data, 64, drop_last=False)),
        "none": fit(DataLoader(data, 64, drop_last=True)),
        "one": fit(DataLoader(Numbered(3), 64)),
        "long schedule": fit(DataLoader(data, 4), schedule=OneCycle(0.1, 20)),
        "schedule": fit(DataLoader(data, 4), schedule=OneCycle(0.1, 10)),
    }


def ours(count):
    data = Numbered(count)
    return fastmp.data.dataset.Arrays(data.images, data.labels)


def our_validation():
    return fastmp.data.loader(ours(7), 2, shuffle=False)


def equals_one_rank_with_twice_the_batch(world):
    data = Numbered(64)

    def loader(size):
        generator = torch.Generator().manual_seed(5)
        return DataLoader(data, size, shuffle=True, generator=generator)

    return fit(loader(4))["weights"], fit(loader(8), world=World())["weights"]


def unequal(world):
    """Three batches against two: as lists, without a length, in a stream that says five."""
    data = ranks.batches(6, 4)
    own = data[:3] if world.rank == 0 else data[3:5]

    class Unsized:
        def __iter__(self):
            return iter(own)

    stream = Stream(20, world.rank, 2, length=40)
    stream.samples = stream.samples[: 6 - 2 * world.rank]
    return {
        "list": fit(own),
        "unsized": fit(Unsized()),
        "stream": fit(DataLoader(stream, 2)),
        "accumulated": fit(Unsized(), accumulate=2),
        "length lies": len(fit(own, epochs=1)["train"]),
    }


class Endless:
    """Every index, without a length."""

    def __iter__(self):
        return iter(range(16))


class Own(DataLoader):
    """Draws its batches past its sampler."""

    def __iter__(self):
        return iter(ranks.batches(4, 4))


def equal(world):
    """Loaders that give both ranks the same batches."""
    batches = ranks.batches(3, 4)
    return {
        "list": fit(batches),
        "stream": fit(DataLoader(Stream(16), 4)),
        "sampler without a length": fit(DataLoader(Numbered(16), 4, sampler=Endless())),
        "own class": fit(Own(Numbered(32), 4)),
        "split stream": fit(DataLoader(Stream(16, world.rank, 2), 4)),
        "sampler of one": fit(
            DataLoader(Numbered(8), 2, sampler=DistributedSampler(Numbered(8), 2, 0))
        ),
    }


def resumed(world, folder):
    """Stopped within the second epoch, and resumed."""

    def loader():
        return DataLoader(Numbered(24), 4, shuffle=True)  # 3 batches a rank

    torch.manual_seed(7 + world.rank)
    whole = trainer_for(folder=folder / "resumed", save_every=4, keep=9)
    whole.fit(loader(), DataLoader(Numbered(7), 2), 3)
    torch.manual_seed(100)
    again = trainer_for()
    again.resume(folder / "resumed" / "checkpoints" / "step-000000004")
    again.fit(loader(), DataLoader(Numbered(7), 2), 2)
    return whole.model.layers.state_dict(), again.model.layers.state_dict(), again.model.seen[True]


def main(folder):
    torch.set_num_threads(1)
    with rendezvous.torchrun_group(CPU) as world:
        results = {
            "map": map_style(world),
            "twice": equals_one_rank_with_twice_the_batch(world),
            "unequal": unequal(world),
            "equal": equal(world),
            "resumed": resumed(world, folder),
        }
        torch.save(results, folder / f"loaders-{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
