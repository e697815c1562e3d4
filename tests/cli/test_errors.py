"""Errors of the command line: one line, an exit code, no files."""

import dataclasses
import re

import pytest

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli
from fastmp.data import fashion
from fastmp.recipe import TrainConfig
from tests.cli.runs import FAST, newest


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
        (["--config", "absent.toml"], "config file absent.toml: not found"),
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
    """Exit code and output."""
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
    assert max(map(len, shown.splitlines())) <= 80  # a terminal's columns
    code, shown = usage(capsys, "train", "--help")
    assert code == 0
    for field in dataclasses.fields(TrainConfig):
        assert re.search(f"--{field.name.replace('_', '-')}[ ,]", shown)
    for wrong in (["fly"], ["train", "--epohcs"], ["train", "--epochs", "many"]):
        code, shown = usage(capsys, *wrong)
        assert code == 2
        assert wrong[-1] in shown


@pytest.mark.parametrize(
    "command", ["train", "bench", "lr-find", "predict", "evaluate", "export", "doctor", "verify"]
)
def test_help_names_defaults_in_the_words_of_the_command_line(capsys, command):
    code, shown = usage(capsys, command, "--help")
    assert code == 0
    assert "None" not in shown


@pytest.mark.parametrize("flag", ["--batch-size", "--epochs", "--image-size", "--lr", "--base-lr"])
def test_a_number_that_is_none_is_named(capsys, flag):
    with pytest.raises(SystemExit):
        cli.main(["train", flag, "many"])
    error = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    number = "a number" if flag.endswith("lr") else "a whole number"
    assert f"expected {number}, got 'many'" in error
    assert "None" not in error
