"""Loaders that know nothing of ranks, on two ranks; processes without a process group."""

import os
import socket
import subprocess
import sys
from itertools import chain

import pytest
import torch

from fastmp.distributed import rendezvous
from fastmp.distributed.rendezvous import World
from tests.distributed import loader_ranks
from tests.distributed.launcher import ROOT, torchrun
from tests.training.test_trainer import small_model, trainer_for


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaders")
    done = torchrun(loader_ranks.__file__, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"loaders-{rank}.pt", weights_only=False) for rank in (0, 1)]


def epochs_of(results, case):
    """The sizes of each rank's batches, and the samples of all ranks, by epoch."""
    one, two = (part["map"][case]["train"] for part in results)
    assert len(one) == len(two)
    half = len(one) // 2
    sizes = [[len(batch) for batch in rank] for rank in (one, two)]
    return sizes, [list(chain(*one[s], *two[s])) for s in (slice(half), slice(half, None))]


@pytest.mark.parametrize(
    ("case", "sizes", "dropped"),
    [
        ("shuffled", ([4] * 5, [4, 4, 4, 4, 1]), 0),
        ("drop_last", ([4] * 4, [4] * 4), 5),
        ("rest", ([9, 9], [9, 9]), 1),  # too little for a batch on each rank
        ("batch_sampler", ([6] * 3, [6] * 3), 1),
        ("batch_size None", ([4] * 4, [4] * 4), 5),
        ("ours", ([4] * 4, [4] * 4), 5),
        ("too few", ([18], [19]), 0),
    ],
)
def test_every_rank_has_its_own_batches(results, case, sizes, dropped):
    found, epochs = epochs_of(results, case)
    assert found == [2 * list(size) for size in sizes]
    for samples in epochs:
        assert len(samples) == len(set(samples)) == 37 - dropped
    assert (epochs[0] != epochs[1]) == (
        case in ("shuffled", "drop_last", "ours", "batch_size None")
    )


def test_workers_and_collate_fn_stay(results):
    for part in results:  # the loader reverses every batch
        plain, worked = (part["map"][case]["train"] for case in ("shuffled", "workers"))
        assert worked == [batch[::-1] for batch in plain[:5]]


def test_a_sampler_with_weights_is_drawn_from_once(results):
    one, two = (part["map"]["weighted"]["train"] for part in results)
    assert one != two
    assert max(chain(*one, *two)) < 12  # the others have weight 0


def test_a_schedule_made_for_one_rank_is_said(results):
    one, two = (part["map"]["long schedule"]["warnings"] for part in results)
    assert len(one) == 1
    assert "the schedule has 20 steps, and the run ends at 10" in one[0]
    assert two == results[0]["map"]["schedule"]["warnings"] == []


def test_a_distributed_sampler_stays(results):
    _, epochs = epochs_of(results, "distributed")
    for samples in epochs:
        assert set(samples) == set(range(37))
        assert len(samples) == 38  # it repeats one


@pytest.mark.parametrize("case", ["shuffled", "ours"])
def test_evaluation_is_split_too(results, case):
    samples = [list(chain(*part["map"][case]["val"][:2])) for part in results]
    assert sorted(samples[0] + samples[1]) == list(range(7))
    assert all(len(part) < 5 for part in samples)


@pytest.mark.parametrize("case", ["none", "one"])
def test_too_few_batches_are_refused(results, case):
    for part in results:
        assert "expected a batch for each of 2 ranks" in part["map"][case]["error"]


def test_two_ranks_equal_one_with_twice_the_batch(results):
    for part in results:
        torch.testing.assert_close(*part["twice"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["list", "unsized", "stream", "accumulated"])
def test_an_epoch_ends_with_the_shortest_rank(results, case):
    one, two = (part["unequal"][case] for part in results)
    assert one["error"] == two["error"] == ""
    assert len(one["train"]) == len(two["train"]) == 4  # two batches in each of two epochs
    assert torch.equal(one["weights"], two["weights"])
    assert one["warnings"] == [
        "the ranks have 3, 2 batches: every epoch ends with the shortest, after 2"
    ]


EQUAL = ["list", "stream", "sampler of one", "sampler without a length", "own class"]


@pytest.mark.parametrize("case", EQUAL)
def test_the_same_batches_on_both_ranks_are_refused(results, case):
    for part in results:
        assert "gives several ranks the same batches" in part["equal"][case]["error"]
        assert part["equal"][case]["steps"] == 0
        assert part["equal"]["split stream"]["error"] == ""


def test_a_split_loader_resumes_to_the_bit(results):
    for part in results:
        whole, again, seen = part["resumed"]
        torch.testing.assert_close(whole, again, rtol=0, atol=0)
        assert len(seen) == 5  # of nine batches


# ---- without a process group ----


def test_processes_that_never_met_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes .* have no process group"):
        trainer_for(small_model())
    assert trainer_for(small_model(), world=World()).world.size == 1


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with rendezvous.torchrun_group(torch.device("cpu")):
        assert trainer_for(small_model()).world == World()


def test_any_launcher_that_sets_torchruns_variables_makes_a_group():
    code = (
        "import torch; from fastmp.distributed import rendezvous\n"
        "with rendezvous.torchrun_group(torch.device('cpu')) as world:\n"
        "    print(world.gather(world.rank))"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in started] == ["[0, 1]"] * 2
