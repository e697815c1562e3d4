"""The picture of a run's curves."""

import io

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


@pytest.mark.parametrize("theme", curves.THEMES)
@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("validated", [True, False])
def test_every_length_of_run_has_a_picture_in_both_themes(tmp_path, theme, steps, validated):
    writer = log.Log(tmp_path)
    row = {"epoch": 1, "lr": 0.1, "scale": 1.0, "skipped": False, "grad_norm": 2.0}
    for step in range(1, steps + 1):
        writer.write("step", step=step, loss=1 / step, **row)
    val = {"val_loss": 1.0, "val_accuracy": 0.5} if validated else dict.fromkeys(
        ("val_loss", "val_accuracy")
    )  # fmt: skip
    writer.write("epoch", step=steps, epoch=1, train_loss=1.0, samples_per_second=9.0, **val)
    figure = curves._figure(
        log.read(tmp_path / log.FILE, "step"), log.read(tmp_path / log.FILE, "epoch"), "t",
        curves.THEMES[theme],
    )  # fmt: skip
    file = io.BytesIO()
    assert curves.draw(tmp_path, "t", theme=theme, file=file) is None
    assert file.getvalue()[:4] == b"\x89PNG"
    assert not (tmp_path / "curves.png").exists()
    loss, accuracy = figure.axes[:2]
    assert all(tick == int(tick) for tick in loss.get_xticks())  # whole steps
    drawn = [line for line in loss.get_lines() if len(line.get_xdata()) == steps]
    assert drawn
    assert (drawn[-1].get_marker() == "o") == (steps <= 40)  # a point alone has no line
    assert ("val accuracy: 50.00 %" in accuracy.get_title("left")) == validated


def test_a_picture_needs_a_step(tmp_path):
    (tmp_path / log.FILE).write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        curves.draw(tmp_path, "title")
