"""The picture of a run's curves."""

import pytest

from fastmp.report import curves
from fastmp.training import log


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
