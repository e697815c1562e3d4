"""Short trainings by the command line."""

import subprocess
import sys

from fastmp import checkpoint, cli
from fastmp.checkpoint.manager import Checkpoints
from fastmp.training import log

FAST = ["--model", "mlp", "--epochs", "2", "--dtype", "fp32"]


def in_a_process(*arguments, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastmp", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def run(tmp_path, *flags, name="out"):
    out = tmp_path / name
    assert cli.main(["train", *FAST, "--out", str(out), *flags]) == 0
    return out, log.read(out / "metrics.jsonl", "step")


def newest(folder):
    return checkpoint.load(Checkpoints(folder / "checkpoints").newest())
