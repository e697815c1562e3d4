"""The library alone, without the extra [train]: what runs, and what the rest asks for."""

import subprocess
import sys

import pytest

import fastmp

TRAIN = ["matplotlib", "safetensors", "sklearn", "tensorboard", "tqdm", "tyro", "jinja2", "PIL"]


def without(code, packages=TRAIN):
    """A process in which these packages are not installed."""
    hidden = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", hidden + code], capture_output=True, text=True, check=False
    )


def command(*words):
    return without(f"from fastmp import cli; sys.exit(cli.main({list(words)!r}))")


def test_doctor_verify_and_the_version_run():
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    assert "operations" in done.stdout
    done = command("verify", "--dtypes", "fp32", "--model", "mlp", "--in-shape", "1", "4", "4")
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout
    assert command("--version").stdout == f"fastmp {fastmp.__version__}\n"


@pytest.mark.parametrize("name", ["train", "predict", "bench"])
def test_the_other_commands_name_the_extra(name):
    done = command(name)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastmp: error: fastmp {name} needs '")
    assert line.endswith("; install it with: pip install 'fastmp[train]'")


def test_public_names_say_which_extra_they_need():
    code = """
import fastmp
for name in ("Trainer", "checkpoint", "load", "transfer"):
    try: getattr(fastmp, name)
    except ImportError as error: print(error)
fastmp.data, fastmp.graphed, fastmp.verify
"""
    done = without(code)
    assert done.returncode == 0, done.stderr
    names = [line.partition(" needs")[0] for line in done.stdout.splitlines()]
    assert names == [f"fastmp.{n}" for n in ("Trainer", "checkpoint", "load", "transfer")]
    assert done.stdout.count("pip install 'fastmp[train]'") == 4
