"""Ranks, process groups and stores under torchrun and without it."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from fastmp.distributed import rendezvous


def test_the_world_of_a_torchrun_job(results):
    assert [part["world"] for part in results[:2]] == [
        rendezvous.World(0, 2, 0),
        rendezvous.World(1, 2, 1),
    ]


def test_ranks_meet_in_a_store_with_keys_of_dead_ranks():
    """torchrun keeps its store when it restarts workers."""
    store = HashStore()
    for key in ("0", "1", "2", "all", "seen/1", "seen/2"):
        store.set(f"fastmp/{key}", "dead")

    def meet(rank):
        time.sleep((0.0, 0.1, 0.05)[rank])
        return rendezvous.fresh_store(store, rank, 3)

    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(meet, range(3)))
        again = list(pool.map(meet, range(3)))
    stores[0].set("key", "value")
    assert [met.get("key") for met in stores] == [b"value"] * 3
    assert not any(met.check(["key"]) for met in again)


THREADS = """
import gc
import sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from fastmp.distributed import rendezvous

gc.disable()  # an automatic collection may come after the group

def threads():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]

def train():
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()

with rendezvous.group(torch.device("cpu"), 0, 1, init_method=sys.argv[1]):
    train()
    print(*threads())
print(*threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_outlives_the_group(tmp_path):
    """A thread that waits for the interpreter's lock at exit aborts the process."""
    command = [sys.executable, "-c", THREADS, f"file://{tmp_path}/store"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    inside, after = done.stdout.splitlines()
    assert "gloo" in inside
    assert "gloo" not in after


def test_the_world_without_torchrun():
    with rendezvous.torchrun_group(torch.device("cpu")) as world:
        assert world == rendezvous.World() == rendezvous.current()
    assert world.broadcast_object(3) == 3
    assert world.gather(3) == [3]
    assert world.is_first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, "a number in the environment variable RANK, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "variable WORLD_SIZE, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has no MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_half_of_a_launchers_environment_is_named(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    group = rendezvous.torchrun_group(torch.device("cpu"))
    with pytest.raises(rendezvous.LauncherError, match=message):
        group.__enter__()
