"""Processes that train together: who they are and how they find each other.

    torchrun --nproc-per-node=8 -m fastmp train ...

torchrun starts the processes and says in the environment who is who.
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
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and saves."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The first rank's ``value``, on every rank."""
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

    def max(self, value: int) -> int:
        """The largest ``value`` of all ranks, on every rank."""
        return max(map(int, self.gather(value)))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def current() -> World:
    """The world of the process group there is; one process if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local_rank)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """In the block this process is one of those torchrun started: NCCL on GPUs, gloo on CPUs.

    Without torchrun's environment, or where a process group exists already, nothing is joined.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield current()
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    with group(device, rank, size, store=_met(store, rank, size)) as world:
        yield world


@contextmanager
def group(device: torch.device, rank: int, size: int, **where: Any) -> Iterator[World]:
    """In the block this process is one of a group: NCCL on GPUs, gloo on CPUs.

    Its threads end with the block. One of gloo's may still wait for the interpreter's lock, to drop
    the last tensor: an interpreter that ends meanwhile aborts the process (torch 2.13, 2 of 8 runs
    with a switch interval of 5 s). What ``fsdp.shard`` makes stays in torch's caches, and with
    it the group and its threads.

    Args:
        device: of the tensors; a GPU is this process's own, and becomes the current one.
        rank: this process's number in the group.
        size: how many there are.
        where: they meet, as torch.distributed.init_process_group takes it: store or init_method.
    """
    # It keeps the group there is at its import, as a default argument: there must be none yet.
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
        gc.collect()  # models hold the group; its threads are joined when nothing does
        dist.destroy_process_group()


def _met(store: Store, rank: int, size: int) -> Store:
    """A part of ``store`` that nobody but the processes of this attempt has written to.

    torchrun (2.13) keeps its store when it starts workers again. A process that finds the address
    of a dead one there, before the new one has written its own, fails or waits for ever: so did 4
    of 5 killed runs on a busy machine, and with this none of 14. Every process shows the first one
    a fresh number; the first one shows what it sees until all have found their own number in it.
    Its own names the part.
    """
    own = uuid.uuid4().hex
    store.set(f"fastmp/{rank}", own)

    def read(*keys: str) -> list[str]:
        return [store.get(f"fastmp/{key}").decode() for key in keys]

    if rank > 0:
        shown: list[str] = []
        while own not in shown:
            time.sleep(0.01)
            shown = read("all")[0].split()
        store.set(f"fastmp/seen/{rank}", shown[0])
        return PrefixStore(shown[0], store)
    seen: list[str] = []
    while seen != [own] * (size - 1):
        store.set("fastmp/all", " ".join(read(*map(str, range(size)))))
        time.sleep(0.01)
        answers = [f"seen/{other}" for other in range(1, size)]
        seen = read(*answers) if store.check([f"fastmp/{key}" for key in answers]) else []
    return PrefixStore(own, store)


def own_device(kind: str) -> torch.device:
    """This process's device of a kind: with several processes a machine, the GPU of its number."""
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)
