"""Script for torchrun: the cases of the distributed tests, results of each rank in a file.

torchrun --nproc-per-node=2 tests/distributed/ranks.py FOLDER
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
from pathlib import Path

import torch

import fastmp.optim
from fastmp import amp
from fastmp.distributed import fsdp, rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import OneCycle
from fastmp.training.trainer import Trainer

BATCH, STEPS = 8, 50
CPU = torch.device("cpu")


def model_in(dtype=torch.float32, *, norm=False):
    torch.manual_seed(0)
    layers = [torch.nn.Flatten(), torch.nn.Linear(12, 16, bias=not norm)]
    layers += [torch.nn.BatchNorm1d(16)] if norm else []
    layers += [torch.nn.ReLU(), torch.nn.Linear(16, 3)]
    return amp.convert(torch.nn.Sequential(*layers), dtype)


def batches(count, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 1, 3, 4, generator=generator).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def half(batch, rank):
    """A rank's half of a batch."""
    return tuple(part.chunk(2)[rank] for part in batch)


def trainer_for(model, **options):
    optimizer = fastmp.optim.AdamW(list(model.named_parameters()), lr=0.01, max_grad_norm=0.5)
    return Trainer(model, optimizer, CrossEntropyLoss(), progress=False, **options)


def digest(model):
    values = model.state_dict().values()
    return hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in values)).hexdigest()


def equals_one_rank_with_twice_the_batch(world):
    data = batches(STEPS, 2 * BATCH)
    trainer = trainer_for(model_in(), schedule=OneCycle(0.01, STEPS))
    digests = []
    for batch in data:
        trainer.train_step([half(batch, world.rank)])
        digests.append(digest(trainer.model))
    alone = trainer_for(model_in(), schedule=OneCycle(0.01, STEPS), world=World())
    for batch in data:
        alone.train_step([batch])
    return {
        "digests": digests,
        "weights": trainer.model.state_dict(),
        "alone": alone.model.state_dict(),
        "losses": [trainer.last_loss(), alone.last_loss()],
    }


def digests_of(trainer, world):
    """Of the weights after each of six steps in bf16."""
    digests = []
    for batch in batches(6, 2 * BATCH, torch.bfloat16):
        trainer.train_step([half(batch, world.rank)])
        digests.append(digest(trainer.model))
    return digests


def muon(world):
    model = model_in(torch.bfloat16)
    groups = fastmp.optim.muon_groups(model)
    optimizer = fastmp.optim.Muon(groups, lr=0.02, max_grad_norm=0.5)
    trainer = Trainer(model, optimizer, CrossEntropyLoss(), progress=False)
    rules = [group["rule"] for group in optimizer.param_groups]
    return {"digests": digests_of(trainer, world), "rules": rules}


def narrow_moments(world, state_dtype):
    """With averages; 8 bits from 4,096 elements on."""
    torch.manual_seed(0)
    wide = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 512), torch.nn.ReLU(), torch.nn.Linear(512, 3)
    )
    optimizer = fastmp.optim.AdamW(
        amp.convert(wide, torch.bfloat16).parameters(), lr=0.01, state_dtype=state_dtype, ema=0.9
    )
    trainer = Trainer(wide, optimizer, CrossEntropyLoss(), progress=False)
    digests = digests_of(trainer, world)
    return {"digests": digests, "averages": optimizer.averages(), "state": optimizer.state_dict()}


def overflow_on_one_rank(world):
    """In the third step the gradients of rank 1 are infinite."""
    model = model_in(torch.float16)
    trainer = trainer_for(model, scaler=amp.GradScaler("cpu", init_scale=256.0))
    steps = []
    for number, batch in enumerate(batches(5, 2 * BATCH, torch.float16)):
        images, labels = half(batch, world.rank)
        handle = None
        if number == 2 and world.rank == 1:
            handle = model[1].weight.register_hook(lambda g: g * math.inf)
        before = digest(model)
        trainer.train_step([(images, labels)])
        if handle is not None:
            handle.remove()
        optimizer = trainer.optimizer
        steps.append(
            {
                "unchanged": digest(model) == before,
                "scale": trainer.scaler.get_scale(),
                "skipped": int(optimizer.skipped_steps),
                "applied": int(optimizer.applied_steps),
                "first_nonfinite": optimizer.nonfinite_param(),
                "digest": digest(model),
            }
        )
    return steps


def accumulation(world, dtype=torch.bfloat16):
    """Three passes a step on each rank, against six on one; batch norm statistics are rank 0's."""
    data = batches(12, 2 * BATCH, dtype)
    groups = [data[i : i + 3] for i in range(0, 12, 3)]
    trainer = trainer_for(model_in(dtype), accumulate=3)
    for group in groups:
        trainer.train_step([half(batch, world.rank) for batch in group])
    alone = trainer_for(model_in(dtype), accumulate=6, world=World())
    for group in groups:
        alone.train_step([half(batch, rank) for batch in group for rank in (0, 1)])
    weights = {name: value.float() for name, value in trainer.model.state_dict().items()}
    expected = {name: value.float() for name, value in alone.model.state_dict().items()}
    return {"digest": digest(trainer.model), "weights": weights, "alone": expected}


def unequal_parts(world, dtype, *, shards=False):
    """Passes of 4 and 1 samples on rank 0, of 2 and 1 on rank 1, against one batch of 8."""
    criterion = CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]), ignore_index=2)
    scaler = amp.GradScaler("cpu", init_scale=64.0)

    def trainer(params, model, **options):
        optimizer = fastmp.optim.SGD(params, lr=1.0, max_grad_norm=0.5)
        if "shards" in options:
            options["shards"].attach(optimizer)
        return Trainer(model, optimizer, criterion, progress=False, accumulate=2, **options)

    model = model_in() if shards else model_in(dtype)
    options = {"shards": fsdp.shard(model, dtype)} if shards else {}
    params = (options["shards"] if shards else model).named_parameters()
    split = trainer(params, model, scaler=scaler, **options)
    whole = model_in(dtype)
    unscaled = amp.GradScaler("cpu", init_scale=1.0, enabled=dtype == torch.float16)
    alone = trainer(whole.parameters(), whole, scaler=unscaled, world=World())
    for images, labels in batches(3, 8, dtype):
        labels[-1] = 2  # the last part has none that counts
        parts = list(zip(images.split([4, 1, 2, 1]), labels.split([4, 1, 2, 1]), strict=True))
        split.train_step(parts[:2] if world.is_first else parts[2:])
        alone.train_step([(images, labels)])
    return {
        "weights": {k: v.float() for k, v in split.state_dict()["model"].items()},
        "alone": {k: v.float() for k, v in whole.state_dict().items()},
        "losses": [split.last_loss(), alone.last_loss()],
        "norms": [float(t.optimizer.grad_norm) for t in (split, alone)],
    }


def evaluation(world):
    """Unequal numbers of batches on the ranks; both report the mean over all batches."""
    data = batches(3, 2 * BATCH)
    trainer = trainer_for(model_in(norm=True))
    for batch in data:
        trainer.train_step([half(batch, world.rank)])
    together = trainer.evaluate(data if world.rank == 0 else data[:1])
    alone = trainer_for(model_in(norm=True), world=World())
    alone.model.load_state_dict(trainer.model.state_dict())
    whole = alone.evaluate([*data, data[0]])
    return {"together": together, "alone": whole}


def terminated(world, folder):
    """SIGTERM to rank 1 alone, in its fourth step."""

    def loader():
        for number, batch in enumerate(batches(40, 2 * BATCH)):
            if number == 3 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield half(batch, world.rank)

    trainer = trainer_for(model_in(), folder=folder / "run")
    try:
        trainer.fit(loader(), batches(1, BATCH), 1)
    except KeyboardInterrupt as stop:
        return {"kind": type(stop).__name__, "message": str(stop), "step": trainer.step}
    return {"kind": "none"}


def main(folder):
    from tests.distributed import shard_ranks  # which imports this module

    torch.set_num_threads(1)
    with rendezvous.torchrun_group(CPU) as world:
        results = {
            "world": world,
            "twice": equals_one_rank_with_twice_the_batch(world),
            "muon": muon(world),
            "bf16 moments": narrow_moments(world, torch.bfloat16),
            "8-bit moments": narrow_moments(world, "8bit"),
            "overflow": overflow_on_one_rank(world),
            "accumulation": accumulation(world),
            "evaluation": evaluation(world),
            "unequal": unequal_parts(world, torch.float32),
            "unequal fp16": unequal_parts(world, torch.float16),
            "unequal shards": unequal_parts(world, torch.float32, shards=True),
            "sharded": shard_ranks.equals_whole(world, torch.float32),
            "sharded accumulation": shard_ranks.equals_whole(world, torch.float32, accumulate=2),
            "sharded norm": shard_ranks.equals_whole(world, torch.float32, norm=True),
            "sharded bf16 norm": shard_ranks.equals_whole(world, torch.bfloat16, norm=True),
            "sharded overflow": shard_ranks.overflow(world),
            "sharded resumes": shard_ranks.resumes(world, folder),
            "sharded bf16 moments": shard_ranks.resumes(world, folder, torch.bfloat16),
            "sharded average": shard_ranks.average(world, folder),
            "terminated": terminated(world, folder),
        }
        torch.save(results, folder / f"rank-{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
