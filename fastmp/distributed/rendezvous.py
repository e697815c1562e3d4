"""The ranks of a distributed run and their process group.

    torchrun --nproc-per-node=8 -m fastmp train ...

torchrun starts the processes; rank, world size and address come from its environment variables.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=30)  # of one collective: the first may wait for a slow disk


@dataclass(frozen=True)
class World:
    """This process's rank and local rank, and the number of ranks in the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the rank that prints and saves."""
        return self.rank == 0

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def min(self, value: int) -> int:
        """The smallest ``value`` of all ranks, on every rank."""
        return min(map(int, self.gather(value)))

    def max(self, value: int) -> int:
        """The largest ``value`` of all ranks, on every rank."""
        return max(map(int, self.gather(value)))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def current() -> World:
    """The world of the current process group; a single rank without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local_rank)


class LauncherError(ValueError):
    """The environment variables of a launcher are not complete, or no numbers."""


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """The number of processes that a launcher started together, as torchrun's environment says.

    Raises:
        LauncherError: RANK or WORLD_SIZE is not a number.
    """
    if "RANK" not in os.environ:
        return 1
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "1").isdecimal():
            raise LauncherError(
                f"expected a number in the environment variable {name}, got {os.environ[name]!r}; "
                "unset it, or start with torchrun"
            )
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined() -> World:
    """The world of the process group, which processes that were started together must have.

    Raises:
        RuntimeError: a launcher started several, and they have none.
    """
    world = current()
    if launched() > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"{launched()} processes were started together (WORLD_SIZE) and have no process group: "
            "each would train alone, on the same data, into the same folder. Put the run into "
            "`with fastmp.distributed.rendezvous.torchrun_group(device):`, or call "
            "torch.distributed.init_process_group() first; Trainer(world=World()) trains alone"
        )
    return world


@contextmanager
def torchrun_group(device: torch.device) -> Iterator[World]:
    """The process group of a torchrun job, for the block: NCCL on GPUs, gloo on CPUs.

    Any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT will do. Without them, or
    inside an existing process group, none is made.

    Raises:
        LauncherError: some of them are missing.
    """
    if dist.is_initialized() or ("TORCHELASTIC_RUN_ID" not in os.environ and launched() == 1):
        yield current()
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise LauncherError(
            f"{launched()} processes were started together (WORLD_SIZE), but the environment has "
            f"no {', '.join(missing)}; start them with torchrun, or unset RANK and WORLD_SIZE"
        )
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    with group(device, rank, size, store=fresh_store(store, rank, size)) as world:
        yield world


@contextmanager
def group(device: torch.device, rank: int, size: int, **where: Any) -> Iterator[World]:
    """A process group for the block: NCCL on GPUs, gloo on CPUs.

    The group's threads end with the block. A gloo thread may still wait for the interpreter's lock,
    to free its last tensor: an interpreter that exits meanwhile aborts the process (torch 2.13, 2
    of 8 runs with a switch interval of 5 s). Modules made by ``fsdp.shard`` stay in torch's caches
    and keep the group and its threads alive.

    Args:
        device: of the tensors; a GPU becomes the current device.
        rank: of this process in the group.
        size: number of ranks.
        where: the ranks meet, store or init_method of ``torch.distributed.init_process_group``.
    """
    # Its import binds the default group as a default argument: import it before a group exists.
    import_module("torch.distributed.nn")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if on_gpu else None,
        **where,
    )
    try:
        yield current()
    finally:
        gc.collect()  # models refer to the group; its threads are joined with the last reference
        dist.destroy_process_group()


def fresh_store(store: Store, rank: int, size: int) -> Store:
    """A part of ``store`` with keys of this attempt only.

    torchrun (2.13) keeps its store when it restarts workers. A process that reads the address of a
    dead rank there, before the new rank has written its own, fails or blocks: 4 of 5 killed runs on
    a busy machine, none of 14 with a fresh part. Every rank writes a random id; rank 0 publishes
    the ids it reads until each rank has found its own among them. Rank 0's id names the part.
    """
    own = uuid.uuid4().hex
    store.set(f"fastmp/{rank}", own)

    def read(*keys: str) -> list[str]:
        return [store.get(f"fastmp/{key}").decode() for key in keys]

    if rank > 0:
        published: list[str] = []
        while own not in published:
            time.sleep(0.01)
            published = read("all")[0].split()
        store.set(f"fastmp/seen/{rank}", published[0])
        return PrefixStore(published[0], store)
    seen: list[str] = []
    while seen != [own] * (size - 1):
        store.set("fastmp/all", " ".join(read(*map(str, range(size)))))
        time.sleep(0.01)
        answers = [f"seen/{other}" for other in range(1, size)]
        seen = read(*answers) if store.check([f"fastmp/{key}" for key in answers]) else []
    return PrefixStore(own, store)


def own_device(kind: str) -> torch.device:
    """The device of this process: under torchrun the GPU with the number of its local rank."""
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)
