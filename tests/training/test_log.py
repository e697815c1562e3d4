"""The log: lines on disk, TensorBoard events, and both cut at the step of a resumed run."""

from __future__ import annotations

import math
import time

import pytest

from fastmp.training import log


def step_row(step, skipped=False):
    return {
        "step": step,
        "epoch": 1,
        "lr": 0.1,
        "loss": 1.0 / step,
        "scale": 1.0,
        "grad_norm": math.inf if skipped else 2.0,
        "skipped": skipped,
    }


def events_in(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: no events",
    )
    events = accumulator.EventAccumulator(str(folder / log.EVENTS))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_events_show_every_tenth_step_and_every_skipped_one(tmp_path):
    writer = log.Log(tmp_path)
    for step in range(1, 31):
        writer.write("step", **step_row(step, skipped=step == 7))
    writer.write("epoch", step=30, epoch=1, val_loss=0.5, val_accuracy=0.9, samples_per_second=10.0)
    writer.write("telemetry", step=30, updates_lost=4.0)
    writer.close()
    assert len(log.read(tmp_path / log.FILE, "step")) == 30
    events = events_in(tmp_path)
    assert [step for step, _ in events["train/loss"]] == [7, 10, 20, 30]
    assert events["train/skipped"][0] == (7, 1.0)
    assert events["val/accuracy"] == [(30, pytest.approx(0.9))]
    assert events["telemetry/updates_lost"] == [(30, 4.0)]


def test_rewind_drops_what_came_after_and_a_torn_line(tmp_path):
    writer = log.Log(tmp_path)
    for step in range(1, 31):
        writer.write("step", **step_row(step))
    writer.close()
    time.sleep(1.01 - time.time() % 1)  # TensorBoard orders the files of a process by the second
    path = tmp_path / log.FILE
    with path.open("a") as out:
        out.write('{"kind": "step", "st')
    assert [row["step"] for row in log.read(path, "step")] == list(range(1, 31))
    writer = log.Log(tmp_path)
    writer.rewind(20, 0)
    assert [row["step"] for row in log.read(path, "step")] == list(range(1, 21))
    for step in range(21, 41):
        writer.write("step", **step_row(step))
    writer.close()
    assert [row["step"] for row in log.read(path, "step")] == list(range(1, 41))
    assert [step for step, _ in events_in(tmp_path)["train/lr"]] == [10, 20, 30, 40]


def test_rewind_drops_an_epoch_that_was_not_saved_after_its_validation(tmp_path):
    writer = log.Log(tmp_path)
    measured = dict.fromkeys(("val_loss", "val_accuracy", "samples_per_second"), 1.0)
    for epoch in (1, 2):
        writer.write("epoch", step=10 * epoch, epoch=epoch, **measured)
    writer.resume(20, 1)
    writer.write("epoch", step=20, epoch=2, **measured)
    writer.close()
    assert [row["epoch"] for row in log.read(tmp_path / log.FILE, "epoch")] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / log.FILE
    path.write_text('{"kind": "step", "step": 1}\nnonsense\n{"kind": "step", "step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2: expected JSON with a kind, got 'nonsense'"):
        log.read(path, "step")


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = log.Log(None)
    writer.write("step", **step_row(1))
    writer.rewind(0, 0)
    writer.close()
    assert list(tmp_path.iterdir()) == []
