"""The checkpoints of a run: the last whole one loads, wherever a kill hits.

The kills of ``make test`` are few; ``make soak`` has them all.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastmp import checkpoint
from fastmp.checkpoint import CheckpointError
from fastmp.checkpoint.manager import Checkpoints

KILLS = 50 if os.environ.get("FASTMP_SOAK") else 6


def state_of(step, size=1000):
    return {"step": step, "weights": torch.full((size,), float(step))}


def is_whole(state):
    step = state["step"]
    return state["checkpoint"]["step"] == step and bool((state["weights"] == step).all())


@pytest.mark.parametrize("background", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, background):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, background=background)
    assert checkpoints.newest() is checkpoints.best() is checkpoints.load_newest() is None
    for step, score in enumerate((0.1, 0.9, 0.5, None, 0.3), 1):
        assert checkpoints.save(state_of(step), step, score).name == f"step-{step:09d}"
    checkpoints.wait()
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-000000002", "step-000000004", "step-000000005"]
    assert checkpoints.best().name == "step-000000002"
    assert checkpoints.newest().name == "step-000000005"
    assert is_whole(checkpoints.load_newest())


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    weights = torch.zeros(4_000_000)
    checkpoints.save({"nested": [{"w": weights}], "n": 1}, 1)
    weights.fill_(7.0)  # training goes on
    checkpoints.wait()
    assert not checkpoints.load_newest()["nested"][0]["w"].any()


def test_the_same_step_again_replaces(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"value": 1}, 3)
    checkpoints.save({"value": 2}, 3)
    checkpoints.wait()
    assert checkpoints.load_newest()["value"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


def test_what_went_wrong_on_the_thread_is_raised_once(tmp_path):
    (tmp_path / "c").write_text("a file is in the way")
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(state_of(1), 1)
    with pytest.raises(OSError, match="c"):
        checkpoints.save(state_of(2), 2)
    checkpoints.wait()
    checkpoints.save({"odd": object()}, 3)
    with pytest.raises((CheckpointError, OSError)):
        checkpoints.wait()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "foreign", "emptied"])
def test_a_damaged_one_is_passed_over(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path, background=False)
    for step in (1, 2):
        checkpoints.save(state_of(step), step, score=step)
    folder = checkpoints.newest()
    (file,) = folder.glob("*.safetensors")
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif harm == "flipped":
        contents = bytearray(file.read_bytes())
        contents[-1] ^= 4
        file.write_bytes(contents)
    elif harm == "foreign":
        (folder / "manifest.json").write_text('{"format": "another"}')
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be used"):
        checkpoint.load(folder)
    with pytest.warns(UserWarning, match=r"passed over: .*step-000000002"):
        assert checkpoints.load_newest()["step"] == 1
    assert checkpoints.best() is not None
    (tmp_path / "step-000000001" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        checkpoints.load_newest()


SAVER = """
import sys, torch
from fastmp.checkpoint.manager import Checkpoints
checkpoints = Checkpoints(sys.argv[1], background=bool(int(sys.argv[3])))
for step in range(int(sys.argv[2]), 10**6):
    checkpoints.save({"step": step, "weights": torch.full((500_000,), float(step))}, step)
    if step % 4 == 0:  # the same step once more, as a run that was resumed may
        checkpoints.save({"step": step, "weights": torch.full((500_000,), float(step))}, step)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("background", ["0", "1"])
def test_killed_while_saving_the_last_whole_one_loads(tmp_path, background):
    dice = random.Random(0)
    checkpoints = Checkpoints(tmp_path)
    last = 0
    for _ in range(KILLS // 2):
        command = [sys.executable, "-c", SAVER, str(tmp_path), str(last + 1), background]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            time.sleep(dice.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            printed = process.stdout.read().split()
        state = checkpoints.load_newest()  # a warning would be an error: nothing is half there
        assert is_whole(state)
        # in the background the last two may be on their way
        assert state["step"] >= max(int(printed[-1]) if printed else 0, last) - 2
        last = state["step"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
