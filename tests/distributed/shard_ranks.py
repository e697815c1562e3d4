"""The cases of ``ranks.py`` with the model in shards (FSDP2)."""

from __future__ import annotations

import math

import torch

import fastmp.optim
from fastmp import amp
from fastmp.distributed import fsdp, rendezvous
from fastmp.distributed.rendezvous import World
from fastmp.nn import CrossEntropyLoss
from fastmp.training.trainer import Trainer
from tests.distributed.ranks import BATCH, STEPS, batches, half, model_in, trainer_for


def in_shards(model, dtype=torch.float32, **options):
    if rendezvous.current().rank == 1:  # rank 0's weights are broadcast
        for param in model.parameters():
            param.data += 1
    shards = fsdp.shard(model, dtype)
    optimizer = fastmp.optim.AdamW(shards.named_parameters(), lr=0.01, max_grad_norm=0.5)
    shards.attach(optimizer)
    return Trainer(model, optimizer, CrossEntropyLoss(), progress=False, shards=shards, **options)


def equals_whole(world, dtype, *, accumulate=1, norm=False, scaler=None):
    """Shards on two ranks against the whole model on one."""
    data = batches(STEPS, 2 * BATCH, dtype)
    split = in_shards(model_in(norm=norm), dtype, accumulate=accumulate, scaler=scaler)
    # BatchNorm statistics are those of a rank's own batch: both ranks get the same batch
    of_rank = (lambda batch: batch) if norm else (lambda batch: half(batch, world.rank))
    alone = trainer_for(model_in(dtype, norm=norm), accumulate=accumulate, world=World())
    norms = []
    for start in range(0, STEPS, accumulate):
        group = data[start : start + accumulate]
        split.train_step([of_rank(batch) for batch in group])
        alone.train_step(group)
        norms.append([float(t.optimizer.grad_norm) for t in (split, alone)])
    activations = []
    handle = split.model[-2].register_forward_pre_hook(
        lambda _, inputs: activations.append(inputs[0].dtype)
    )
    with torch.no_grad():
        split.model.eval()(data[0][0])
    handle.remove()
    together = split.evaluate(data[: 3 - world.rank])
    return {
        "weights": split.state_dict()["model"],
        "alone": alone.model.state_dict(),
        "norms": norms,
        "losses": [split.last_loss(), alone.last_loss()],
        "own": sum(p.numel() for _, p in split.shards.named_parameters()),
        "evaluation": together,
        "activations": activations,
        "expected": in_whole(split, dtype, norm).evaluate([*data[:3], *data[:2]]),
    }


def in_whole(trainer, dtype, norm):
    alone = trainer_for(model_in(dtype, norm=norm), world=World())
    alone.model.load_state_dict(trainer.state_dict()["model"])
    return alone


def _explode(module, inputs, output):
    """Make the gradients of a layer infinite."""
    output.register_hook(lambda grad: grad * math.inf)


def overflow(world):
    """In the third step the gradients of rank 1 are infinite."""
    trainer = in_shards(model_in(), torch.float16, scaler=amp.GradScaler("cpu", init_scale=256.0))
    steps = []
    for number, batch in enumerate(batches(5, 2 * BATCH, torch.float16)):
        images, labels = half(batch, world.rank)
        handle = None
        if number == 2 and world.rank == 1:
            handle = trainer.model[1].register_forward_hook(_explode)
        before = trainer.state_dict()["model"]
        trainer.train_step([(images, labels)])
        if handle is not None:
            handle.remove()
        after = trainer.state_dict()["model"]
        steps.append(
            {
                "unchanged": all(torch.equal(before[name], after[name]) for name in after),
                "scale": trainer.scaler.get_scale(),
                "skipped": int(trainer.optimizer.skipped_steps),
                "first_nonfinite": trainer.optimizer.nonfinite_param(),
            }
        )
    return steps


def resumes(world, folder, state_dtype=None):
    """Saved after half the steps, loaded into a new trainer and into one without shards."""

    def narrow(trainer):
        trainer.optimizer.state_dtype = state_dtype
        return trainer

    folder = folder / str(state_dtype)
    data = batches(10, 2 * BATCH, torch.bfloat16)

    def train(trainer, part):
        for batch in part:
            trainer.train_step([half(batch, world.rank)])
        return trainer

    first = train(narrow(in_shards(model_in(), torch.bfloat16)), data[:5])
    first.save(folder / "sharded")
    second = narrow(in_shards(model_in(), torch.bfloat16))
    second.resume(folder / "sharded")
    whole = narrow(trainer_for(model_in(), world=World()))
    whole.resume(folder / "sharded")
    states = [train(t, data[5:]).state_dict() for t in (first, second)]
    return {
        "states": [[s["model"], s["optimizer"]["state"]] for s in states],
        "whole": whole.optimizer.state_dict()["state"],
        "step": whole.step,
    }


class WithHead(torch.nn.Module):
    """The head belongs to no container: FSDP2's root has it, and keeps it gathered."""

    def __init__(self):
        super().__init__()
        self.body, self.head = model_in(norm=True), torch.nn.Linear(3, 3)

    def forward(self, images):
        return self.head(self.body(images))


def average(world, folder):
    """Evaluated twice between steps and saved; against one rank, and resumed with and without."""
    data = batches(8, 2 * BATCH)  # the same on both ranks: batch norm's statistics are a rank's own
    split = in_shards(WithHead(), ema=0.8)
    alone = trainer_for(WithHead(), ema=0.8, world=World())
    evaluations, unchanged = [], []

    @torch.no_grad()
    def predict(trainer):  # the root has its weights gathered afterwards
        trainer.model.eval()(data[0][0])
        trainer.model.train()

    for number, batch in enumerate(data):
        for trainer in (split, alone):
            trainer.train_step([batch])
        if number in (2, 3):
            before = [p.detach().clone() for _, p in split.shards.named_parameters()]
            predict(split)
            evaluations.append([t.evaluate(data[:2]).loss for t in (split, alone)])
            after = [p for _, p in split.shards.named_parameters()]
            unchanged += map(torch.equal, before, after)
        if number == 3:
            split.save(folder / "average")
    again = in_shards(WithHead(), ema=0.8)
    whole = trainer_for(WithHead(), ema=0.8, world=World())
    for trainer in (again, whole):
        predict(trainer)
        trainer.resume(folder / "average")
        for batch in data[4:]:
            trainer.train_step([batch])
    states = [t.state_dict() for t in (split, again, whole, alone)]
    predict(split)
    return {
        "states": [[state["model"], state["ema"]] for state in states],
        "optimizer": list(states[0]["optimizer"]["state"][0]),
        "loose": split.shards.full_optimizer_state(split.optimizer)["state"],
        "evaluations": evaluations,
        "unchanged": unchanged,
    }
