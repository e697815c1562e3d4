"""Faults around a command: damaged files, a full disk, a user's code that raises, Ctrl-C, a closed
pipe. Each is one line on stderr and an exit code, and none of them loses a finished run.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import checkpoint, cli
from fastmp.checkpoint.manager import Checkpoints
from fastmp.training import log
from tests.cli.runs import FAST, in_a_process, newest, run
from tests.data.image_cases import write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, _ = run(tmp_path_factory.mktemp("finished"))
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def error_of(capsys, *words, code=2):
    """The one line on stderr of a command that fails."""
    assert cli.main([*map(str, words)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastmp {words[0]}: ")
    return line


# ---- damaged files ----


def truncated(folder):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])


def emptied(folder):
    for file in folder.iterdir():
        file.write_bytes(b"")


def garbage(folder):
    for file in folder.iterdir():
        file.write_bytes(os.urandom(1000))


def without_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    file.unlink()


def of_something_else(folder):
    checkpoint.save(folder, {"weights": [1, 2]})


def not_a_folder(folder):
    shutil.rmtree(folder)
    folder.write_text("a file")


DAMAGE = [truncated, emptied, garbage, without_tensors, not_a_folder]


@pytest.mark.parametrize("harm", [*DAMAGE, of_something_else], ids=lambda f: f.__name__)
def test_damaged_checkpoints_are_one_line(out, capsys, harm):
    for folder in (out / "checkpoints").iterdir():
        harm(folder)
    resumed = error_of(capsys, "train", "--out", out, "--resume", "--epochs", 3)
    transferred = error_of(capsys, "train", *FAST, "--init-from", out, "--out", out / "new")
    if harm is of_something_else:
        assert "expected the state of a trainer, got one without ema, model, optimizer" in resumed
        assert "without tensors" in transferred
    else:
        assert f"no checkpoint in {out / 'checkpoints'} can be used: " in resumed
        assert "cannot be read" in transferred or "does not exist" in transferred


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over(out, capsys, harm):
    harm(Checkpoints(out / "checkpoints").newest())
    with pytest.warns(UserWarning, match=r"passed over: .*step-000000044"):
        assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert "resumed at step 22, epoch 2" in capsys.readouterr().out
    assert newest(out)["progress"]["epoch"] == 2


def test_a_tensor_that_is_not_in_the_file_is_a_damaged_checkpoint(tmp_path):
    checkpoint.save(tmp_path, {"a": 1})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    content = manifest["content"]
    content["state"] = {"$dict": [["a", {"$tensor": "gone"}]]}
    manifest["sha256"] = checkpoint.format._content_sum(content)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be used: .*found KeyError"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"text"])
def test_weights_that_are_none_are_one_line(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    flags = ["--init-from", tmp_path / name, "--out", tmp_path / "run"]
    assert f"{tmp_path / name} cannot be read" in error_of(capsys, "train", *FAST, *flags)


@pytest.mark.parametrize("text", ["nonsense", '{"step": 1}', "[1]", "3", "", "\\xff"])
def test_a_line_of_the_log_that_is_no_row(out, capsys, text):
    with (out / "metrics.jsonl").open("ab") as lines:
        lines.write(b"\xff\n" if text == "\\xff" else text.encode() + b"\n")
    line = error_of(capsys, "train", "--out", out, "--resume", "--epochs", 3)
    assert "metrics.jsonl, line" in line
    assert f"expected JSON with a kind, got {text!r}; delete the line" in line


@pytest.mark.parametrize("harm", ["a file", "a broken link"])
def test_checkpoints_that_are_no_folder_do_not_start_the_run_again(out, capsys, harm):
    path = out / "checkpoints"
    shutil.rmtree(path)
    path.write_text("") if harm == "a file" else path.symlink_to("a disk that is not there")
    rows = (out / "metrics.jsonl").read_bytes()
    line = error_of(capsys, "train", "--out", out, "--resume", "--epochs", 3)
    assert f"{path}: expected a folder of checkpoints, found a file or a broken link" in line
    assert (out / "metrics.jsonl").read_bytes() == rows


def test_leftovers_among_the_checkpoints_lose_no_epoch(out, tmp_path):
    (tmp_path / "kept").mkdir()
    (out / "checkpoints" / "step-000000007.unfinished").write_text("")
    (out / "checkpoints" / "step-000000008.unfinished").symlink_to(tmp_path / "kept")
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    assert newest(out)["progress"]["epoch"] == 3
    assert (tmp_path / "kept").exists()


# ---- a full disk ----


@pytest.mark.skipif(os.name != "posix", reason="files have no limit of size on Windows")
@pytest.mark.parametrize("size", [300, 2_000, 20_000, 500_000])
def test_a_full_disk(tmp_path, size):
    """Stood in for by a limit on the size of a file. First comes config.toml,
    then the lines, the events and the checkpoint, of 1 MB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    # Python would cut its bytecode of the modules as well, and fail to read it from then on
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = in_a_process(
        "train", *FAST, "--out", "run", cwd=tmp_path, preexec_fn=limit, env=environment
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastmp train: error: [Errno 27] File too large")
    assert "run" in line
    assert in_a_process("train", *FAST, "--out", "run", "--resume", cwd=tmp_path).returncode == 0


# ---- arguments and code of the user ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lr-find", "--low", 1, "--high", 0.1), "expected 0 < low < high, both finite, got low=1"),
        (("lr-find", "--low", "nan"), "expected 0 < low < high, both finite, got low=nan"),
        (("lr-find", "--steps", 1), "steps must be at least 3, got 1"),
        (("verify", "--classes", 0), "classes: expected a whole number of at least 1, got 0"),
        (("verify", "--in-shape", 1, 0, 8), "in_shape: expected a whole number of at least 1"),
        (("verify", "--seed", -1), "seed: expected a whole number from 0"),
        (("verify", "--device", "abacus"), "device: expected one that works here"),
        (("bench", "--threads", 0), "threads: expected a whole number of at least 1, got 0"),
        (("train", "--config", "."), "config file .: expected TOML, got: [Errno 21]"),
        (("train", "--out", "/dev/null/run"), "out: expected a folder that can be written to"),
        (("train", "--init-from", "nowhere"), "nowhere does not exist"),
        (("train", "--data", ""), "an existing folder or hf:NAME, got ''"),
        (("train", "--data", "hf:"), "an existing folder or hf:NAME, got 'hf:'"),
        (("train", "--device", "meta"), "device: expected one that works here, got 'meta'"),
        (("train", "--image-size", 100_000), "image_size: expected a whole number from 1 to 10000"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def net(a, b): raise KeyError('x')", "net raised KeyError: 'x' ({file}, line 1)"),
        ("def net(a, b): pass", "must return a torch.nn.Module, got NoneType"),
        (
            "import torch\ndef net(a, b): return torch.nn.Linear(3, 3)",
            "RuntimeError: mat1 and mat2",
        ),
        (
            "1 / 0",
            "the import of {name} raised ZeroDivisionError: division by zero ({file}, line 1)",
        ),
        ("x = = 1", "raised SyntaxError: invalid syntax ({name}.py, line 1)"),
        ("import sys\nsys.exit(3)", "raised SystemExit: 3 ({file}, line 2)"),
        ("net = 3", "to be a function of (in_shape, classes), found an object of type int"),
    ],
)
def test_a_model_of_the_users_that_raises_is_one_line(
    tmp_path, monkeypatch, capsys, request, code, message
):
    name = f"faulty_{abs(hash(request.node.name))}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text(code)
    message = message.format(name=name, file=tmp_path / f"{name}.py")
    assert message in error_of(capsys, "train", *FAST, "--model", f"{name}:net")
    assert message in error_of(capsys, "verify", "--dtypes", "fp32", "--model", f"{name}:net")


# ---- signals and pipes ----


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process on POSIX systems only")
@pytest.mark.parametrize("seconds", [0.2, 0.6])
def test_ctrl_c_while_a_command_imports(tmp_path, seconds):
    with subprocess.Popen(
        [sys.executable, "-m", "fastmp", "train"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "fastmp: interrupted\n"
    assert process.returncode == -signal.SIGINT  # 130 in a shell


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX systems")
@pytest.mark.parametrize("words", ["--help", "train --help", "doctor"])
def test_a_reader_that_has_gone(tmp_path, words):
    with subprocess.Popen(
        [sys.executable, "-m", "fastmp", *words.split()],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_closed_output(tmp_path):
    done = in_a_process("doctor", cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert done.stderr == ""
    assert done.returncode == 0


# ---- after training ----


def broken_matplotlib(folder):
    (folder / "matplotlib").mkdir()
    (folder / "matplotlib" / "__init__.py").write_text("raise ImportError('no font cache')")
    return "curves.png could not be made: ImportError: no font cache"


def no_jinja(folder):
    (folder / "jinja2.py").write_text("raise ImportError('broken')")
    return "report.html could not be made: ImportError: broken"


@pytest.mark.parametrize("harm", [broken_matplotlib, no_jinja], ids=lambda f: f.__name__)
def test_nothing_after_the_training_loses_its_result(tmp_path, harm):
    (tmp_path / "broken").mkdir()
    message = harm(tmp_path / "broken")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'broken'}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = in_a_process("train", *FAST, "--out", "run", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastmp: warning: {message}")
    assert "val accuracy" in done.stdout
    assert newest(tmp_path / "run")["progress"]["epoch"] == 2


def test_files_that_cannot_be_written_after_the_training(out, tmp_path, capsys):
    for name in ("curves.png", "report.html"):
        (out / name).unlink()
        (out / name).mkdir()
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    shown = capsys.readouterr()
    picture, report = shown.err.splitlines()
    assert picture.startswith("fastmp: warning: curves.png could not be made: IsADirectoryError")
    assert report.startswith("fastmp: warning: report.html could not be made: IsADirectoryError")
    assert "after 3 epochs" in shown.out
    flags = ["--model", "mlp", "--dtype", "fp32", "--picture", str(tmp_path)]
    assert cli.main(["lr-find", *flags]) == 0
    shown = capsys.readouterr()
    assert "suggestion: --lr" in shown.out
    assert shown.err.startswith(f"fastmp: warning: {tmp_path} could not be made: IsADirectory")


# ---- within the validation ----


def test_a_broken_image_of_the_validation_loses_no_epoch(tmp_path, capsys):
    write(tmp_path / "pets", ("train", "val"))
    broken = sorted((tmp_path / "pets" / "val").rglob("*.*"))[0]
    good = broken.read_bytes()
    broken.write_bytes(good[:60])
    out = tmp_path / "run"
    data = ["--data", tmp_path / "pets", "--image-size", 8, "--workers", 0, "--batch-size", 4]
    line = error_of(capsys, "train", *FAST, *data, "--out", out)
    assert f"{broken} cannot be read" in line
    assert line.endswith(f"; the state before the validation is saved in {out / 'checkpoints'}")
    broken.write_bytes(good)
    steps = log.read(out / log.FILE, "step")
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert log.read(out / log.FILE, "step")[: len(steps)] == steps
    assert [row["epoch"] for row in log.read(out / log.FILE, "epoch")] == [1, 2]
