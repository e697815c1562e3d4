"""Script for torchrun: parameters that other libraries split over the ranks.

torchrun --nproc-per-node=2 tests/distributed/split_ranks.py FOLDER
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fastmp
from fastmp.distributed import rendezvous

CPU = torch.device("cpu")
STEPS, CLIPS = 3, [0.1, 0.05, 0.2]
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Lion")


def net(dtype):
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(model, dtype, part):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 5, generator=generator).to(dtype)
    return (model(images[part]) * 8).square().mean()


def own_part(world):
    count = 8 // world.size
    return slice(world.rank * count, (world.rank + 1) * count)


def optimizer_of(name, params, **options):
    return getattr(fastmp.optim, name)(params, lr=0.01, **options)


def alone(name, dtype):
    """The whole model on one rank; gradients clipped by torch: weights and norms."""
    model, norms = net(dtype), []
    optimizer = optimizer_of(name, model.parameters())
    for clip in CLIPS:
        optimizer.zero_grad()
        loss_of(model, dtype, slice(None)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return norms, full(model)


def full(model):
    if not isinstance(model, FullyShardedDataParallel):
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    with FullyShardedDataParallel.summon_full_params(model):
        # a flat parameter is padded to a multiple of the number of ranks
        return torch.cat([p.detach().flatten() for p in model.parameters()])[:66].clone()


def trained(world, name, dtype, wrapped, optimizer, inner=None):
    inner = inner or optimizer
    inner.set_schedule([0.01] * STEPS, None, CLIPS)
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, dtype, own_part(world)).backward()
        optimizer.step()
        norms.append(float(inner.grad_norm))
    expected_norms, weights = alone(name, dtype)
    return {
        "norms": norms,
        "expected norms": expected_norms,
        "weights": full(wrapped),
        "expected weights": weights,
        "applied": int(inner.applied_steps),
    }


def fsdp(dtype, **options):
    return FullyShardedDataParallel(net(dtype), device_id=CPU, **options)


def in_fsdp(world, name="SGD", dtype=torch.float32, **options):
    model = fsdp(dtype, **options)
    return trained(world, name, dtype, model, optimizer_of(name, model.parameters()))


def in_zero(world, name="SGD", dtype=torch.float32):
    model = DistributedDataParallel(net(dtype))
    kind = getattr(fastmp.optim, name)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.01)
    return trained(world, name, dtype, model, optimizer, optimizer.optim)


def made_before_the_model_is_wrapped(world):
    model = net(torch.float32)
    optimizer = optimizer_of("SGD", model.parameters())
    wrapped = FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)
    return trained(world, "SGD", torch.float32, wrapped, optimizer)


def poison(optimizer, value=math.inf):
    params = (p for group in optimizer.param_groups for p in group["params"])
    next(p.grad for p in params if p.grad is not None and p.grad.numel()).view(-1)[0] = value


def overflow(world, model, optimizer, inner, scaler=None, value=math.inf):
    """In the second step the last rank alone has a gradient that is not finite."""
    steps = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, torch.float32, own_part(world))
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step == 1 and world.rank == world.size - 1:
            poison(inner, value)
        before = full(model)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        steps.append(
            {
                "unchanged": torch.equal(before, full(model)),
                "scale": None if scaler is None else scaler.get_scale(),
                "applied": int(inner.applied_steps),
            }
        )
    return steps


def overflows(world):
    found = {}
    for scaler in (None, ShardedGradScaler, fastmp.amp.GradScaler):
        model = fsdp(torch.float32, use_orig_params=True)
        optimizer = optimizer_of("AdamW", model.parameters())
        made = scaler and scaler("cpu", init_scale=8.0)
        name = scaler.__name__ if scaler else "no scaler"
        found[f"fsdp {name}"] = overflow(world, model, optimizer, optimizer, made)
    model = DistributedDataParallel(net(torch.float32))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), fastmp.optim.AdamW, lr=0.01)
    found["zero"] = overflow(world, model, optimizer, optimizer.optim, value=math.nan)
    return found


def a_rank_without_parameters(world):
    """One weight for all ranks; a step without gradients on any rank is none."""
    found = {}
    model = torch.nn.Linear(1, 1, bias=False)
    model = FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)
    optimizer = optimizer_of("Lion", model.parameters(), max_grad_norm=1.0)
    scaler = fastmp.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.step()
    scaler.scale(model(torch.ones(2, 1)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    found["fsdp"] = float(optimizer.grad_norm), int(optimizer.applied_steps), scaler.get_scale()
    model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), fastmp.optim.SGD, lr=0.1)
    optimizer.optim.max_grad_norm = 1.0
    model(torch.ones(2, 1)).sum().backward()
    optimizer.step()
    found["zero"] = float(optimizer.optim.grad_norm), int(optimizer.optim.applied_steps)
    return found


def refusals(world):
    """Messages, and whether the weights are what they were."""
    model = fsdp(torch.float32, use_orig_params=True)
    optimizer = optimizer_of("SGD", model.parameters(), max_grad_norm=1.0)
    loss_of(model, torch.float32, own_part(world)).backward()
    before, messages = full(model), []
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    lost = torch.nn.Parameter(torch.ones(2))
    lost._fsdp_flattened = True
    lost.grad = torch.ones(2)
    attempts = [
        lambda: scaler.step(optimizer),
        optimizer_of("SGD", [lost]).step,
        lambda: fastmp.Trainer(model, optimizer, torch.nn.MSELoss()),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages, torch.equal(before, full(model))


def hybrid(world):
    """Replicas of shards, for four ranks: the norm is that of one replica."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    strategy = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    return {
        f"hybrid {orig}": in_fsdp(world, use_orig_params=orig, **strategy) for orig in (True, False)
    }


def splits(world):
    found = {}
    for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
        for orig in (True, False):
            kind = {"use_orig_params": orig, "sharding_strategy": ShardingStrategy[strategy]}
            found[f"{strategy} {orig}"] = in_fsdp(world, **kind)
    for name in OPTIMIZERS[1:]:
        found[f"fsdp {name}"] = in_fsdp(world, name, use_orig_params=True)
        found[f"zero {name}"] = in_zero(world, name)
    found["zero SGD"] = in_zero(world)
    for dtype in (torch.float16, torch.bfloat16):
        found[f"fsdp {dtype}"] = in_fsdp(world, dtype=dtype, use_orig_params=True)
    whole = net(torch.float32)
    mixed = torch.nn.Sequential(
        FullyShardedDataParallel(copy.deepcopy(whole[0]), device_id=CPU, use_orig_params=True),
        whole[1],
        FullyShardedDataParallel(
            copy.deepcopy(whole[2]),
            device_id=CPU,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=True,
        ),
    )
    mixed = FullyShardedDataParallel(mixed, device_id=CPU, use_orig_params=True)
    found["mixed"] = trained(
        world, "SGD", torch.float32, mixed, optimizer_of("SGD", mixed.parameters())
    )
    found["made before"] = made_before_the_model_is_wrapped(world)
    return found


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with rendezvous.torchrun_group(CPU) as world:
        if world.size == 4:
            results = {"splits": hybrid(world)}
        else:
            results = {
                "splits": splits(world),
                "overflows": overflows(world),
                "without": a_rank_without_parameters(world),
                "refusals": refusals(world),
            }
        torch.save(results, folder / f"split-{world.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
