"""The command line: the main job from flags to the files it leaves, and every wrong turn."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import checkpoint, cli, data, models, recipe
from fastmp.checkpoint.manager import Checkpoints
from fastmp.data import fashion
from fastmp.recipe import ConfigError, TrainConfig
from fastmp.report import curves
from fastmp.schedule import Constant, OneCycle, Warmup
from fastmp.training import log

FAST = ["--model", "mlp", "--epochs", "2", "--dtype", "fp32"]


def fastmp(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastmp", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def newest(folder):
    return checkpoint.load(Checkpoints(folder / "checkpoints").newest())


# ---- the main job ----


def test_train_without_arguments_but_fewer_epochs_learns_the_digits(tmp_path):
    done = fastmp("train", "--epochs", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-convnet-")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.toml",
        "curves.png",
        "events",
        "metrics.jsonl",
        "report.html",
    ]
    last = log.read(folder / "metrics.jsonl", "epoch")[-1]
    assert last["val_accuracy"] >= 0.95
    for part in ("dtype: ", "test accuracy", "samples/s", "skipped steps  0 of 110", "peak memory"):
        assert part in done.stdout
    for op in ("loss", "mix", "update"):
        assert f"  {op} " in done.stdout
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"

    # the checkpoint holds the model that was evaluated
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


def run(tmp_path, *flags, name="out"):
    out = tmp_path / name
    assert cli.main(["train", *FAST, "--out", str(out), *flags]) == 0
    return out, log.read(out / "metrics.jsonl", "step")


def test_the_seed_decides_the_run(tmp_path):
    _, one = run(tmp_path, "--seed", "3", name="one")
    _, two = run(tmp_path, "--seed", "3", name="two")
    _, three = run(tmp_path, "--seed", "4", name="three")
    assert one == two
    assert one != three


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
    assert written["batch_size"] == 64  # every default is written out


def test_accumulate_and_schedule(tmp_path):
    _, steps = run(tmp_path, "--accumulate", "5", "--schedule", "constant", "--warmup", "0.4")
    assert len(steps) == 2 * 5  # 22 batches an epoch: four groups of 5 and one of 2
    assert [row["lr"] / steps[-1]["lr"] for row in steps[:5]] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        run(tmp_path, "--threads", "1")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_model_of_ones_own(tmp_path, monkeypatch):
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
@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process on POSIX systems only")
def test_an_interrupt_keeps_what_there_is(tmp_path):
    command = [sys.executable, "-m", "fastmp", "train", *FAST, "--epochs", "9999", "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs deaf to SIGINT, and this test may run in one
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


# ---- from the recipe to the objects ----


def build(config, dtype=torch.float32):
    digits = data.load("digits")
    config = config.resolved()
    model = recipe.build_model(config, digits)
    return recipe.build_trainer(
        config, digits, model, dtype, torch.device("cpu"), total_steps=100, progress=False
    )


@pytest.mark.parametrize(
    ("name", "activations"),
    [("mlp", ["relu", "relu", "none"]), ("vit", ["none", "none", "gelu", "none"] * 4 + ["none"])],
)
def test_what_is_trained_has_fused_layers(name, activations):
    trainer = build(TrainConfig(model=name), torch.bfloat16)
    layers = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear)]
    assert [layer.activation for layer in layers] == activations


def test_every_field_arrives():
    trainer = build(
        TrainConfig(
            optimizer="adam",
            lr=0.5,
            momentum=0.7,
            peak_momentum=0.6,
            beta2=0.9,
            weight_decay=0.125,
            max_grad_norm=3.0,
            mixup=0.3,
            cutmix=0.4,
            label_smoothing=0.25,
            warmup=0.5,
            accumulate=2,
        )
    )
    decayed, plain = trainer.optimizer.param_groups
    assert type(trainer.optimizer).__name__ == "Adam"
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.125, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert decayed["betas"] == (0.7, 0.9)
    assert trainer.optimizer.max_grad_norm == 3.0
    assert trainer.schedule == OneCycle(0.5, 100, 0.5, base_momentum=0.6, max_momentum=0.7)
    assert (trainer.mixup.alpha, trainer.mixup.cutmix_alpha) == (0.3, 0.4)
    assert trainer.criterion.label_smoothing == 0.25
    assert trainer.accumulate == 2
    assert not trainer.scaler.is_enabled()

    trainer = build(
        TrainConfig(
            optimizer="sgd",
            schedule="constant",
            max_grad_norm=float("inf"),
            loss_scale=8.0,
            scale_growth_interval=5,
        ),
        torch.float16,
    )
    assert trainer.optimizer.param_groups[0]["nesterov"]
    assert trainer.optimizer.max_grad_norm is None
    assert trainer.schedule == Warmup(Constant(0.1 * 64 / 256, 0.95), 25)
    assert trainer.scaler.get_scale() == 8.0
    assert trainer.scaler.get_growth_interval() == 5
    assert next(trainer.model.parameters()).dtype == torch.float16


def test_defaults_that_depend_on_others():
    digits = TrainConfig().resolved()
    assert (digits.epochs, digits.batch_size, digits.lr) == (15, 64, pytest.approx(2e-3))
    large = TrainConfig(data="fashion-mnist", accumulate=4).resolved()
    assert (large.epochs, large.batch_size, large.lr) == (8, 256, pytest.approx(8e-3))
    kept = TrainConfig(epochs=1, batch_size=7, lr=0.0).resolved()
    assert (kept.epochs, kept.batch_size, kept.lr) == (1, 7, 0.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lr=st.none() | st.floats(0, 10),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.none() | st.integers(1, 9999),
    model=st.sampled_from([*models.MODELS, 'odd "quoted\\name:f']),
    max_grad_norm=st.floats(0, exclude_min=True),
    out=st.none() | st.just("some/where"),
)
def test_config_files_round_trip(tmp_path_factory, out, **fields):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    config = TrainConfig(**fields, out=out and path.parent / out)
    recipe.write_toml(config, path)
    assert recipe.read_toml(path) == config


# ---- wrong turns ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "mnist"], "an existing folder or hf:NAME, got 'mnist'"),
        (["--model", "resnet"], "model: expected mlp, convnet, vit or package.module:factory"),
        (["--model", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["--lr", "-1"], "lr: expected a finite number of at least 0, got -1.0"),
        (["--lr", "nan"], "lr: expected a finite number of at least 0, got nan"),
        (["--epochs", "0"], "epochs: expected a whole number of at least 1, got 0"),
        (["--batch-size", "0"], "batch_size: expected a whole number of at least 1, got 0"),
        (["--label-smoothing", "1.5"], "label_smoothing: expected a number from 0 to 1, got 1.5"),
        (["--momentum", "1"], "momentum: expected a number of at least 0 and below 1, got 1.0"),
        (["--max-grad-norm", "0"], "max_grad_norm: expected a number above 0, got 0.0"),
        (["--device", "abacus"], "device: expected one that works here, got 'abacus'"),
        (["--config", "absent.toml"], "config file absent.toml: expected TOML, got:"),
        (["--config", "broken.toml"], "config file broken.toml: expected TOML, got:"),
        (
            ["--config", "unknown.toml"],
            "unknown key 'epohcs'; the known ones are data,",
        ),
        (["--config", "type.toml"], "config file type.toml: lr: expected float, got 'high'"),
        (["--config", "choice.toml"], "dtype: expected auto or fp32 or bf16 or fp16, got 'fp8'"),
        (["--out", "full"], "out: expected a new or empty folder, full is not"),
        (["--out", "broken.toml"], "out: expected a new or empty folder, broken.toml is not"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("lr = = 1")
    (tmp_path / "unknown.toml").write_text("epohcs = 1")
    (tmp_path / "type.toml").write_text('lr = "high"')
    (tmp_path / "choice.toml").write_text('dtype = "fp8"')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", *FAST, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmp train: error: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_a_corrupt_data_file_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for file in fashion._FASHION_FILES.values():
        (folder / f"{file.name}.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    monkeypatch.setenv("FASTMP_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *FAST, "--data", "fashion-mnist"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-images-idx3-ubyte.gz cannot be used: expected 47040016 bytes" in line


def test_a_run_that_stops_is_exit_code_1_with_state_and_picture(tmp_path, capsys):
    flags = ["--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", "inf", "--warmup", "0"]
    assert cli.main(["train", *FAST, *flags, "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "stopped at step" in line
    assert "the loss is" in line
    assert "out/checkpoints" in line
    newest(tmp_path / "out")
    assert (tmp_path / "out" / "curves.png").exists()


def usage(capsys, *arguments):
    """Exit code and what was shown."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_help_and_bad_usage(capsys):
    code, shown = usage(capsys)
    assert code == 0
    assert "  train " in shown
    code, shown = usage(capsys, "train", "--help")
    assert code == 0
    for field in dataclasses.fields(TrainConfig):
        assert re.search(f"--{field.name.replace('_', '-')}[ ,]", shown)
    for wrong in (["fly"], ["train", "--epohcs"], ["train", "--epochs", "many"]):
        code, shown = usage(capsys, *wrong)
        assert code == 2
        assert wrong[-1] in shown


def test_without_the_training_extra_the_command_says_what_to_install(tmp_path):
    # an interpreter in which tyro cannot be imported
    program = (
        "import sys; sys.modules['tyro'] = None\nfrom fastmp.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "the command line needs 'tyro'; install it with: pip install 'fastmp[train]'" in (
        done.stderr
    )


# ---- the picture ----


def test_the_picture_of_a_run_without_a_finished_epoch_or_a_finite_norm(tmp_path):
    writer = log.Log(tmp_path)
    row = {"epoch": 1, "loss": 2.0, "lr": 0.1, "scale": 8.0, "skipped": True}
    for step in (1, 2):
        writer.write("step", step=step, grad_norm=float("inf"), **row)
    assert log.read(tmp_path / log.FILE)[0]["grad_norm"] is None
    assert curves.draw(tmp_path, "title").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_needs_a_step(tmp_path):
    (tmp_path / log.FILE).write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        curves.draw(tmp_path, "title")


def test_bad_fields_are_refused_by_the_dataclass_too():
    with pytest.raises(ConfigError, match="seed: expected a whole number from 0"):
        TrainConfig(seed=-1)
