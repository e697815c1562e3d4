"""Data parallel training on two gloo ranks, which stand for two GPUs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from fastmp import checkpoint
from fastmp.checkpoint.manager import Checkpoints
from fastmp.distributed import data_parallel, fsdp, rendezvous
from fastmp.recipe import ConfigError, TrainConfig
from tests.distributed import ranks

ROOT = Path(__file__).parents[2]


def torchrun(*arguments, processes=2, cwd=ROOT, timeout=300):
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two ranks saw in every check of ``ranks.py``; one start for all."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(ranks.__file__, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    both = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [*both, folder]


def test_torchrun_says_who_is_who(seen):
    assert [part["world"] for part in seen[:2]] == [
        rendezvous.World(0, 2, 0),
        rendezvous.World(1, 2, 1),
    ]


def test_two_ranks_are_one_with_twice_the_batch(seen):
    one, two = (part["twice"] for part in seen[:2])
    assert one["digests"] == two["digests"]  # bitwise, after every step
    assert len(set(one["digests"])) == ranks.STEPS
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, one["alone"][name], rtol=1e-5, atol=1e-6)
    assert one["losses"][0] == two["losses"][0] == pytest.approx(one["losses"][1], rel=1e-5)


def test_an_overflow_on_one_rank_skips_the_step_on_both(seen):
    one, two = (part["overflow"] for part in seen[:2])
    assert one == two
    assert [step["unchanged"] for step in one] == [False, False, True, False, False]
    assert [step["scale"] for step in one] == [256.0, 256.0, 128.0, 128.0, 128.0]
    assert (one[-1]["skipped"], one[-1]["applied"]) == (1, 4)
    assert one[-1]["offender"] == "1.weight"


def test_passes_are_summed_before_the_exchange(seen):
    one, two = (part["accumulation"] for part in seen[:2])
    assert one["digest"] == two["digest"]
    for name, value in one["weights"].items():
        # the mean is rounded to bf16 once more on the wire
        torch.testing.assert_close(value, one["alone"][name], rtol=2e-2, atol=2e-3)


def test_evaluation_covers_what_all_ranks_have(seen):
    for part in seen[:2]:
        result = part["evaluation"]
        assert result["together"].loss == pytest.approx(result["alone"].loss, rel=1e-6)
        assert result["together"].accuracy == pytest.approx(result["alone"].accuracy)


def test_sigterm_on_one_rank_stops_both_at_the_same_step(seen):
    one, two = (part["terminated"] for part in seen[:2])
    assert one == two
    assert one["kind"] == "Terminated"
    assert f"terminated at step {one['step']}; the state is saved in" in one["message"]
    newest = Checkpoints(seen[2] / "run" / "checkpoints").newest()
    state = checkpoint.load(newest)
    assert state["progress"]["step"] == one["step"] < 10
    assert len(state["ranks"]) == 2


# ---- the model in shards ----


SHARDED = ["sharded", "sharded accumulation", "sharded norm", "sharded bf16 norm"]


@pytest.mark.parametrize("case", SHARDED)
def test_shards_train_as_the_whole_model_does(seen, case):
    one, two = (part[case] for part in seen[:2])
    total = sum(value.numel() for value in one["weights"].values() if value.is_floating_point())
    statistics = 32 if "norm" in case else 0  # buffers are not split
    assert one["own"] + two["own"] == total - statistics
    assert max(one["own"], two["own"]) < 0.6 * total
    assert one["activations"] == [torch.bfloat16 if "bf16" in case else torch.float32]
    rtol = 2e-2 if "bf16" in case else 1e-5  # gradients have eight bits there, and Adam divides
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name])
        expected = one["alone"][name].double()
        assert (value - expected).norm() <= rtol * expected.norm()
    for (split, alone), (other, _) in zip(one["norms"], two["norms"], strict=True):
        assert split == other
        assert split == pytest.approx(alone, rel=rtol)
    assert one["losses"][0] == pytest.approx(one["losses"][1], rel=rtol)


@pytest.mark.parametrize("case", SHARDED)
def test_shards_are_evaluated_with_unequal_numbers_of_batches(seen, case):
    for part in seen[:2]:
        found, expected = part[case]["evaluation"], part[case]["expected"]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy)


def test_an_overflow_in_one_rank_skips_the_step_of_all_shards(seen):
    one, two = (part["sharded overflow"] for part in seen[:2])
    assert one == two
    assert [step["unchanged"] for step in one] == [False, False, True, False, False]
    assert [step["scale"] for step in one] == [256.0, 256.0, 128.0, 128.0, 128.0]
    assert one[-1]["skipped"] == 1
    assert one[-1]["offender"] == "1.weight"


def test_shards_resume_bitwise_and_without_shards(seen):
    one, two = (part["sharded resumes"] for part in seen[:2])
    torch.testing.assert_close(one["states"][0], one["states"][1], rtol=0, atol=0)
    torch.testing.assert_close(one["states"], two["states"], rtol=0, atol=0)
    assert one["step"] == 5
    assert one["whole"][0]["exp_avg"].shape == (16, 12)


def test_shards_need_several_processes():
    with pytest.raises(RuntimeError, match="start with torchrun"):
        fsdp.shard(torch.nn.Linear(2, 2), torch.bfloat16)
    with pytest.raises(ConfigError, match="shard: expected several processes"):
        TrainConfig(shard=True).resolved()
    for other in ("ema", "cuda_graph", "telemetry", "unfreeze_every"):
        value = 0.9 if other == "ema" else True
        with pytest.raises(ConfigError, match=f"shard: expected none of .*{other}"):
            TrainConfig(shard=True, **{other: value})


def test_the_command_line_trains_in_shards(tmp_path):
    flags = ["--model", "convnet", "--epochs", "2", "--dtype", "bf16", "--threads", "1", "--shard"]
    where = ["--out", tmp_path / "run"]
    done = torchrun("-m", "fastmp", "train", *flags, *where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"test accuracy +([\d.]+)%", done.stdout)[1]) > 80
    state = Checkpoints(tmp_path / "run" / "checkpoints").load_newest()
    assert state["model"]["0.weight"].shape == (32, 1, 3, 3)
    again = torchrun("-m", "fastmp", "train", *where, "--resume", "--epochs", "3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at step" in again.stdout


# ---- who is who ----


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16, 96, 1024])
def test_the_division_is_split_about_the_root(size):
    before, after = data_parallel._divisors(size)
    assert before * after == size
    assert before & (before - 1) == 0  # exact
    assert size == 1 or size**0.5 / 2 <= after <= 2 * size**0.5


def test_processes_meet_in_a_store_full_of_dead_ones():
    """As torchrun leaves it when it starts workers again: nobody may believe what is there."""
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

gc.disable()  # by itself it may come too late

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


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the names of threads")
def test_no_thread_outlives_the_group(tmp_path):
    """One that waits for the interpreter to drop a tensor when it ends aborts the process."""
    command = [sys.executable, "-c", THREADS, f"file://{tmp_path}/store"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    inside, after = done.stdout.splitlines()
    assert "gloo" in inside
    assert "gloo" not in after


def test_without_torchrun_there_is_one_process():
    with rendezvous.torchrun_group(torch.device("cpu")) as world:
        assert world == rendezvous.World() == rendezvous.current()
    assert world.broadcast_object(3) == 3
    assert world.gather(3) == [3]
    assert world.is_first
