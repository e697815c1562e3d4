"""A read-only home, and read-only folders for results."""

import time

import pytest

from tests.robustness.processes import at_once


@pytest.mark.slow
@pytest.mark.usefixtures("commands")
def test_a_read_only_home(tmp_path):
    """/proc refuses files even from root."""
    out = tmp_path / "run"
    train, _, _ = at_once(
        ["train", "--epochs", "1", "--out", str(out)], ["verify"], ["doctor"], home="/proc"
    )
    assert "accuracy" in train
    assert (out / "curves.png").stat().st_size > 0


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    "words",
    [("train", "--out", "/proc/run"), ("lr-find", "--picture", "/proc/a.png"),
     ("bench", "--out", "/proc/bench")],
    ids=lambda w: w[0],
)  # fmt: skip
def test_a_read_only_folder_for_results_is_refused_at_the_start(words, capsys):
    from fastmp import cli

    start = time.monotonic()
    assert cli.main(words) == 2
    assert "expected a folder that can be written to, got /proc" in capsys.readouterr().err
    assert time.monotonic() - start < 30  # bench takes 20 minutes, lr-find 100 steps
