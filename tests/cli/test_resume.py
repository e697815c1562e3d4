"""fastmp train --resume with other settings: each is refused, and nothing has changed, or is used.

A run of one epoch goes on for another.
"""

import dataclasses
import html
import os
import shutil

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli, files, recipe
from fastmp.recipe import TrainConfig
from fastmp.recipe.resume import FIXED
from fastmp.training import log
from tests.cli.runs import FAST, newest, run
from tests.robustness.processes import holder

REFUSED = {
    "model": "convnet",
    "optimizer": "sgd",
    "data": "fashion-mnist",
    "init_from": "elsewhere",
    "freeze": "1 3",
    "layer_decay": "0.5",
    "dtype": "bf16",
    "loss_scale": "8",
    "seed": "1",
}
#: The steps of the second epoch, or its evaluation, are others than with the recorded settings.
USED = {
    "epochs": "3",
    "batch_size": "100",
    "accumulate": "2",
    "base_lr": "0.1",
    "lr": "0.1",
    "schedule": "cosine",
    "warmup": "0.5",
    "momentum": "0.5",
    "peak_momentum": "0.5",
    "beta2": "0.9",
    "weight_decay": "1.0",
    "max_grad_norm": "0.01",
    "ema": "0.9",
    "state_dtype": "bf16",
    "unfreeze_every": "5",
    "mixup": "0.9",
    "cutmix": "1",
    "label_smoothing": "0.5",
}
#: Settings with tests of their own, here or beside the others of their kind.
ELSEWHERE = {
    "cycles", "device", "cuda_graph", "image_size", "keep", "master", "out", "save_every",
    "scale_growth_interval", "shard", "telemetry", "threads", "workers",
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run of one epoch."""
    out, _ = run(tmp_path_factory.mktemp("first"), "--epochs", "1")
    return out


@pytest.fixture
def out(first, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def plain(first, tmp_path_factory):
    """The rows of the second epoch."""
    out = tmp_path_factory.mktemp("plain") / "run"
    shutil.copytree(first, out)
    assert resume(out) == 0
    return rows(out)


def resume(out, *flags):
    return cli.main(["train", "--epochs", "2", "--out", str(out), "--resume", *flags])


def rows(out):
    steps, epochs = (log.read(out / log.FILE, kind) for kind in ("step", "epoch"))
    losses = [(row["train_loss"], row["val_loss"]) for row in epochs[1:]]
    return [row for row in steps if row["step"] > 22], losses


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flag(name, value):
    return [f"--{name.replace('_', '-')}", *value.split()]


def test_every_setting_is_in_one_of_the_tables():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {*REFUSED, *USED, *ELSEWHERE} == names
    assert {*REFUSED} == {*FIXED, "data"}


def test_the_report_shows_the_first_command_and_those_that_resumed(out):
    first, page = recipe.commands_in(out / "config.toml"), out / "report.html"
    assert len(first) == 1
    for _ in range(2):
        assert resume(out) == 0
    again = f"fastmp train --epochs 2 --out {out} --resume"
    assert recipe.commands_in(out / "config.toml") == [*first, again]
    shown = html.unescape(page.read_text())
    assert [shown.count(f"<code>{command}</code>") for command in (*first, again)] == [1, 1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_change_is_refused_and_nothing_has_changed(out, capsys, name, plain):
    before = contents(out)
    assert resume(out, *flag(name, REFUSED[name])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    recorded = getattr(recipe.read_toml(out / "config.toml"), name)
    shown = "none" if recorded in (None, ()) else recorded
    assert f"error: {name}: expected {shown}, as the run in {out} has it, got" in line
    assert ", ".join(REFUSED[name].split()) in line
    assert contents(out) == before
    if name == "optimizer":  # the rest is the same for all
        assert resume(out) == 0
        assert rows(out) == plain


@pytest.mark.parametrize("name", USED)
def test_what_may_change_is_used_said_and_recorded(out, capsys, name, plain):
    assert resume(out, *flag(name, USED[name])) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "resumed at" in text]
    assert line.startswith("resumed at step 22, epoch 2; changed: ")
    assert f"-> {USED[name]}" in line or f"-> {USED[name]}.0" in line
    assert rows(out) != plain
    written = getattr(recipe.read_toml(out / "config.toml"), name)
    assert written == type(written)(USED[name])


def test_settings_around_the_training_are_used_and_leave_it_alone(out, plain, capsys):
    threads = str(torch.get_num_threads())
    flags = ["--save-every", "7", "--keep", "9", "--telemetry", "--workers", "1", "--device", "cpu"]
    assert resume(out, *flags, "--threads", threads, "--cuda-graph") == 0
    assert "no CUDA graph: " in capsys.readouterr().out  # there is none on a CPU
    assert rows(out) == plain
    saved = sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())
    assert saved == [22, 28, 35, 42, 44]
    assert log.read(out / log.FILE, "telemetry")


def test_cycles_and_the_growth_interval_of_the_scale(tmp_path):
    flags = ["--schedule", "cyclic", "--dtype", "fp16", "--loss-scale", "8", "--epochs", "1"]
    out, _ = run(tmp_path, *flags)
    assert resume(out, "--cycles", "1", "--scale-growth-interval", "11") == 0
    steps, _ = rows(out)
    assert [row["scale"] for row in steps] == [8.0] * 11 + [16.0] * 11
    rates = [row["lr"] for row in steps]
    assert rates == sorted(rates, reverse=True)  # one cycle: the second half falls


def test_a_finished_run_records_nothing(out, capsys):
    before = contents(out)
    assert cli.main(["train", "--out", str(out), "--resume", "--lr", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "nothing left to train: 1 of 1 epochs are done" in shown
    assert "resumed" not in shown
    after = contents(out)
    del before[out / "report.html"], after[out / "report.html"]  # it has a date
    assert after == before


def test_fewer_epochs_than_are_done(out, capsys):
    assert resume(out) == 0
    before = contents(out)
    assert resume(out, "--epochs", "1") == 2
    assert "epochs: expected at least the 2 that the run has finished, got 1" in (
        capsys.readouterr().err
    )
    assert contents(out) == before


def test_a_config_file_counts_as_its_flags(out, tmp_path, capsys, plain):
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text('dtype = "auto"\nmodel = "mlp"\n')  # as a run that is always started so
    other.write_text('model = "vit"\n')
    assert resume(out, "--config", str(other)) == 2
    assert "model: expected mlp, as the run in" in capsys.readouterr().err
    assert resume(out, "--config", str(same)) == 0
    assert recipe.read_toml(out / "config.toml").dtype == "fp32"
    assert rows(out) == plain


def test_the_folder_may_come_from_the_config_file(out, tmp_path, capsys, plain):
    file = tmp_path / "with_out.toml"
    file.write_text(f'model = "mlp"\nepochs = 2\nout = "{out}"\n')
    assert cli.main(["train", "--resume", "--config", str(file)]) == 0
    assert "resumed at step 22, epoch 2; changed: epochs 1 -> 2" in capsys.readouterr().out
    assert rows(out) == plain


def test_data_that_moved(tmp_path, capsys):
    from tests.data.image_cases import write

    write(tmp_path / "pets", ("train", "val"))
    flags = ["--image-size", "8", "--workers", "0", "--batch-size", "4", "--epochs", "1"]
    out, _ = run(tmp_path, "--data", str(tmp_path / "pets"), *flags)
    (tmp_path / "pets").rename(tmp_path / "moved")
    before = contents(out)
    assert resume(out) == 2
    assert "data: expected digits, fashion-mnist, an existing folder" in capsys.readouterr().err
    assert resume(out, "--data", str(tmp_path / "moved"), "--image-size", "9") == 2
    line = capsys.readouterr().err
    assert "1.weight has the shape (1024, 192) in it and (1024, 243) in this model" in line
    assert contents(out) == before
    assert resume(out, "--data", str(tmp_path / "moved")) == 0


WIDTH = """
import torch
def net(in_shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, WIDTH), torch.nn.ReLU(),
                               torch.nn.Linear(WIDTH, classes))
"""


def test_a_model_whose_code_has_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, width in (("width_8", "8"), ("width_9", "9")):
        (tmp_path / f"{name}.py").write_text(WIDTH.replace("WIDTH", width))
    out, _ = run(tmp_path, "--model", "width_8:net", "--epochs", "1")
    (out / "config.toml").write_text(
        (out / "config.toml").read_text().replace("width_8", "width_9")  # as an edit of the code
    )
    before = contents(out)
    assert resume(out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: the checkpoint is of another model: 1.weight has the shape (8, 64) in it" in line
    assert contents(out) == before


def test_settings_that_not_one_step_ran_with_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_small.py").write_text(
        WIDTH.replace("WIDTH", "8") + "class Small(torch.nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        if self.training and len(x) > 64: raise RuntimeError('out of memory')\n"
        "        return super().forward(x)\n"
        "def small(*shape):\n"
        "    return torch.nn.Sequential(Small(), *net(*shape)[1:])\n"
    )
    out, _ = run(tmp_path, "--model", "needs_small:small", "--epochs", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        resume(out, "--batch-size", "65")
    assert recipe.read_toml(out / "config.toml").batch_size == 64
    assert resume(out) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(out):
    shutil.rmtree(out / "checkpoints")
    assert resume(out, "--model", "convnet", "--dtype", "auto", "--epochs", "1") == 0
    assert [row["step"] for row in log.read(out / log.FILE, "step")] == list(range(1, 23))
    assert recipe.read_toml(out / "config.toml").model == "convnet"
    newest(out)


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems only")
def test_two_processes_on_one_folder(out, tmp_path, capsys, plain):
    with holder(out) as other:
        before = contents(out)
        assert resume(out) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out} is in use by process {other.pid} on {os.uname().nodename}; wait" in line
        assert contents(out) == before
        other.kill()
        other.communicate()
    assert (out / files.LOCK).exists()  # a killed process leaves it, and its lock is gone
    assert resume(out) == 0
    assert rows(out) == plain
    assert not (out / files.LOCK).exists()
    with holder(tmp_path) as other:
        assert cli.main(["train", *FAST, "--out", str(tmp_path)]) == 2
        other.communicate("")
    assert "expected a new or empty folder" in capsys.readouterr().err  # 'run' is in it
