"""A run that was killed goes on, and ends with the weights of one that was not: bit for bit.

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

from tests.distributed.launcher import torchrun

pytest.importorskip("tyro", reason="tyro is not installed: no command line to resume with")

from fastmp import checkpoint
from fastmp.checkpoint.manager import Checkpoints
from fastmp.training import log

KILLS = 20 if os.environ.get("FASTMP_SOAK") else 3

# Dropout draws from the global generator, batch norm has running statistics; slow enough to be hit.
MODEL = """
import os, signal, time
import torch
class Slow(torch.nn.Module):
    calls = 0
    def forward(self, x):
        time.sleep(0.003 * self.training)
        Slow.calls += self.training
        if os.environ.get("KILL_RANK") == os.environ.get("RANK") and Slow.calls == 20:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        return x
def net(in_shape, classes):
    return torch.nn.Sequential(
        Slow(), torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32),
        torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, classes),
    )
"""
RECIPE = [
    "train",
    *("--model", "slow_net:net"),
    *("--epochs", "3"),
    *("--batch-size", "16"),
    *("--accumulate", "3"),
    *("--dtype", "fp16"),
    *("--ema", "0.99"),
    *("--mixup", "0.4"),
    *("--cutmix", "1"),
    *("--save-every", "5"),
    *("--threads", "1"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slow_net.py").write_text(MODEL)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "slow_net.py").write_text(MODEL)
    finish(start(folder, folder / "run"))
    return folder / "run"


def start(folder, out):
    command = [sys.executable, "-m", "fastmp", *RECIPE, "--out", str(out), "--resume"]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def flat(value, path=""):
    """Every leaf of a state, by the path that leads to it."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{path}.{i}").items()}
    return {path: value}


def final_state(out):
    """All of the last checkpoint but the seconds it took."""
    state = checkpoint.load(Checkpoints(out / "checkpoints").newest())
    return flat(state)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_killed_at_random_steps_the_run_ends_as_if_it_had_not_been(folder, whole):
    lines = folder / "cut" / "metrics.jsonl"
    dice = random.Random(0)
    killed = 0
    while killed < KILLS:
        process = start(folder, folder / "cut")
        wanted = lines_in(lines) + dice.randrange(1, 12)
        while process.poll() is None and lines_in(lines) < wanted:
            time.sleep(0.001)
        if process.poll() is not None:  # it got through: kill another run
            finish(process)
            assert_same(final_state(whole), final_state(folder / "cut"))
            (folder / "cut").rename(folder / f"through-{killed}")
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    output = finish(start(folder, folder / "cut"))
    assert "resumed at step" in output
    assert_same(final_state(whole), final_state(folder / "cut"))
    steps = [log.read(out / "metrics.jsonl", "step") for out in (whole, folder / "cut")]
    assert steps[0] == steps[1]  # no step is missing, none is there twice


def test_sigterm_saves_and_exits(folder, whole):
    out = folder / "run"
    process = start(folder, out)
    while lines_in(out / "metrics.jsonl") < 12:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "terminated at step" in output
    assert "--resume goes on from there" in output
    assert "Traceback" not in output
    step = log.read(out / "metrics.jsonl", "step")[-1]["step"]
    assert checkpoint.load(Checkpoints(out / "checkpoints").newest())["progress"]["step"] == step
    assert (out / "report.html").exists()

    finish(start(folder, out))
    assert_same(final_state(whole), final_state(out))
    assert "nothing left to train" in finish(start(folder, out))


def test_torchrun_restarts_a_killed_worker(folder, monkeypatch):
    """The whole job starts again from the newest checkpoint, and ends as the undisturbed one."""
    results = []
    for kill in ("nobody", "1"):
        monkeypatch.setenv("KILL_RANK", kill)
        out = folder / f"killed-{kill}"
        flags = ["--max-restarts=3", "-m", "fastmp", *RECIPE, "--out", out, "--resume"]
        done = torchrun(*flags, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("resumed at step" in done.stdout) == (kill == "1")
        results.append(final_state(out))
    assert_same(*results)
    epochs = [log.read(folder / f"killed-{k}" / "metrics.jsonl", "epoch") for k in ("nobody", "1")]
    losses = [[(row["train_loss"], row["val_loss"]) for row in rows] for rows in epochs]
    assert losses[0] == losses[1]
