"""Killed and resumed runs end with the bits of an uninterrupted run.

``make test`` kills 3 times, ``make soak`` 20 times.
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

pytestmark = pytest.mark.slow

KILLS = 20 if os.environ.get("FASTMP_SOAK") else 3

# Dropout draws from the global generator, batch norm has running statistics. The sleep lets a kill
# land within the run.
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
def uninterrupted(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
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
    """Every leaf of a nested state, by its path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{path}.{i}").items()}
    return {path: value}


def final_state(out):
    """Every leaf of the last checkpoint."""
    return flat(checkpoint.load(Checkpoints(out / "checkpoints").newest()))


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        other = two[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_a_run_killed_at_random_steps_ends_with_the_same_bits(folder, uninterrupted):
    lines = folder / "cut" / "metrics.jsonl"
    rng = random.Random(0)
    killed = 0
    while killed < KILLS:
        process = start(folder, folder / "cut")
        wanted = lines_in(lines) + rng.randrange(1, 12)
        while process.poll() is None and lines_in(lines) < wanted:
            time.sleep(0.001)
        if process.poll() is not None:  # finished before the kill: start another run
            finish(process)
            assert_same(final_state(uninterrupted), final_state(folder / "cut"))
            (folder / "cut").rename(folder / f"finished-{killed}")
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    output = finish(start(folder, folder / "cut"))
    assert "resumed at step" in output
    assert_same(final_state(uninterrupted), final_state(folder / "cut"))
    steps = [log.read(out / "metrics.jsonl", "step") for out in (uninterrupted, folder / "cut")]
    assert steps[0] == steps[1]  # no step is missing or repeated


def test_sigterm_saves_and_exits(folder, uninterrupted):
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
    assert_same(final_state(uninterrupted), final_state(out))
    assert "nothing left to train" in finish(start(folder, out))


def test_torchrun_restarts_a_killed_worker(folder, monkeypatch):
    """The restarted job resumes from the newest checkpoint and ends with the same bits."""
    results = []
    for kill in ("none", "1"):
        monkeypatch.setenv("KILL_RANK", kill)
        out = folder / f"killed-{kill}"
        flags = ["--max-restarts=3", "-m", "fastmp", *RECIPE, "--out", out, "--resume"]
        done = torchrun(*flags, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("resumed at step" in done.stdout) == (kill == "1")
        results.append(final_state(out))
    assert_same(*results)
    epochs = [log.read(folder / f"killed-{k}" / "metrics.jsonl", "epoch") for k in ("none", "1")]
    losses = [[(row["train_loss"], row["val_loss"]) for row in rows] for rows in epochs]
    assert losses[0] == losses[1]
