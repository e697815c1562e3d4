"""fastmp train: from flags to the files of a run."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli, data, recipe
from fastmp.training import log
from tests.cli.runs import FAST, in_a_process, newest, run


def test_the_defaults_learn_the_digits_in_five_epochs(tmp_path):
    environment = {**os.environ, "FASTMP_CACHE": str(tmp_path / "cache")}
    done = in_a_process("train", "--epochs", "5", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-convnet-")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "classes.json",
        "config.toml",
        "curves.png",
        "events",
        "metrics.jsonl",
        "model.safetensors",
        "preprocessing.json",
        "report.html",
    ]
    last = log.read(folder / "metrics.jsonl", "epoch")[-1]
    assert last["val_accuracy"] >= 0.95
    for part in ("dtype: ", "val accuracy", "samples/s", "skipped steps  0 of 110", "peak memory"):
        assert part in done.stdout
    assert re.search(r"^  kernels +.*loss, mix", done.stdout, re.MULTILINE)
    for step in (
        f"fastmp predict runs/{folder.name} IMAGE...",
        f"fastmp.load('runs/{folder.name}')",
    ):
        assert step in done.stdout
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"

    # the checkpoint holds the evaluated model
    config = recipe.read_toml(folder / "config.toml")
    assert config.dtype in recipe.DTYPES
    digits = data.load("digits")
    model = recipe.build_model(config, digits)
    model.load_state_dict(newest(folder)["model"])
    inputs = (digits.test.images / 255 - digits.mean[0]) / digits.std[0]
    right = model.eval()(inputs).argmax(1) == digits.test.labels
    assert right.double().mean().item() == pytest.approx(last["val_accuracy"], abs=0.006)


def test_fp16_trains_with_a_loss_scale(tmp_path):
    flags = [*FAST[:-1], "fp16", "--loss-scale", "4096", "--scale-growth-interval", "10"]
    assert cli.main(["train", *flags, "--out", str(tmp_path)]) == 0
    steps = log.read(tmp_path / "metrics.jsonl", "step")
    applied = 0
    expected = 4096.0
    for row in steps:
        assert row["scale"] == expected
        applied = 0 if row["skipped"] else applied + 1
        if row["skipped"]:
            expected /= 2
        elif applied % 10 == 0:
            expected *= 2
    state = newest(tmp_path)
    assert state["model"]["1.weight"].dtype == torch.float16
    assert state["scaler"]["scale"] == expected
    assert log.read(tmp_path / "metrics.jsonl", "epoch")[-1]["val_accuracy"] > 0.8


def test_equal_seeds_give_equal_runs(tmp_path):
    _, one = run(tmp_path, "--seed", "3", name="one")
    _, two = run(tmp_path, "--seed", "3", name="two")
    _, three = run(tmp_path, "--seed", "4", name="three")
    assert one == two
    assert one != three


def test_equal_commands_that_name_no_dtype_give_equal_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "cache"))
    (_, one), (_, two) = (run(tmp_path, "--dtype", "auto", name=name) for name in ("one", "two"))
    assert one == two


def test_a_run_repeats_from_its_own_config(tmp_path):
    flags = ["--optimizer", "sgd", "--lr", "0.05", "--mixup", "0.4", "--cutmix", "1", "--seed", "5"]
    out, one = run(tmp_path, *flags, name="one")
    assert cli.main(["train", "--config", f"{out}/config.toml", "--out", str(tmp_path / "b")]) == 0
    assert log.read(tmp_path / "b" / "metrics.jsonl", "step") == one


def test_flags_override_the_config_file(tmp_path):
    (tmp_path / "c.toml").write_text('lr = 1\nepochs = 3\nmodel = "mlp"\nmax_grad_norm = inf\n')
    command = ["train", "--config", f"{tmp_path}/c.toml", "--epochs", "1", "--dtype", "fp32"]
    assert cli.main([*command, "--lr", "0.001", "--out", str(tmp_path / "out")]) == 0
    written = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (written["lr"], written["epochs"], written["model"]) == (0.001, 1, "mlp")
    assert written["max_grad_norm"] == float("inf")
    assert written["batch_size"] == 64  # defaults are written too


def test_a_flag_overrides_the_other_rate_of_the_file(tmp_path):
    out, _ = run(tmp_path, "--base-lr", "0.002", name="one")
    written = recipe.read_toml(out / "config.toml")
    assert (written.base_lr, written.lr) == (0.002, None)
    command = ["train", "--config", str(out / "config.toml"), "--lr", "0.5", "--epochs", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "two")]) == 0
    written = recipe.read_toml(tmp_path / "two" / "config.toml")
    assert (written.base_lr, written.lr) == (None, 0.5)


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        run(tmp_path, "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_model_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "import torch\n"
        "def net(in_shape, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--model", "mine_for_test:net", "--epochs", "1"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-mine_for_test.net-")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process on POSIX systems only")
def test_an_interrupt_saves_the_state(tmp_path):
    command = [sys.executable, "-m", "fastmp", "train", *FAST, "--epochs", "9999", "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # background jobs of a shell ignore SIGINT, and this test may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted at step" in errors
    assert "Traceback" not in errors
    state = newest(tmp_path / "out")
    assert state["progress"]["step"] == log.read(lines, "step")[-1]["step"]
    assert (tmp_path / "out" / "curves.png").exists()
