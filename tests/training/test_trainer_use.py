"""The trainer as people use trainers: their batches, callbacks, no validation, a report."""

import os
import select
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from fastmp import amp
from fastmp.training import log
from fastmp.training.batches import as_pair
from fastmp.training.progress import EpochResult
from fastmp.training.results import Results
from tests.training.test_trainer import batches, small_model, trainer_for, weights

FORMS = {
    "pairs": ({}, lambda x, y: (x, y)),
    "lists": ({}, lambda x, y: [x, y]),
    "dictionaries": ({}, lambda x, y: {"label": y, "image": x, "path": "a.jpg"}),
    "Hugging Face": ({}, lambda x, y: {"pixel_values": x, "labels": y}),
    "a function": ({"prepare_batch": lambda b: (b[2], b[0])}, lambda x, y: (y, "name", x)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_of_every_form_train_alike(form, accumulate):
    options, make = FORMS[form]
    expected = small_model()
    trainer_for(expected, accumulate=accumulate).fit(batches(3), batches(2), 1)
    model = small_model()
    trainer = trainer_for(model, accumulate=accumulate, **options)
    train, val = ([make(*pair) for pair in batches(count)] for count in (3, 2))
    results = trainer.fit(train, val, 1)
    assert torch.equal(weights(model), weights(expected))
    assert trainer.evaluate(val).accuracy == results[0].val_accuracy
    trainer.train_step(train[:1])
    assert trainer.step == -(-3 // accumulate) + 1


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"photo": 1, "labels": 2}, "got a dictionary with 'photo', 'labels'"),
        ((1, 2, 3), r"got \(int, int, int\)"),
        ("ab", "got str"),
        (torch.zeros(2), "got Tensor"),
    ],
)
def test_other_batches_are_refused(batch, got):
    with pytest.raises(TypeError, match=rf"{got}; prepare_batch=function makes a pair of it"):
        as_pair(batch)


def test_validation_may_be_left_out(tmp_path):
    trainer = trainer_for(small_model(), folder=tmp_path)
    results = trainer.fit(batches(3), epochs=2)
    assert [(e.epoch, e.val_loss, e.val_accuracy) for e in results] == [
        (1, None, None),
        (2, *2 * [None]),
    ]
    assert results.best is None
    assert str(results).splitlines()[0].startswith("  train loss ")
    assert str(results[0]).startswith(f"loss {results[0].train_loss:.3f}  ")
    assert trainer.checkpoints.newest().name == "step-000000006"
    assert log.read(tmp_path / log.FILE, "epoch")[1]["val_accuracy"] is None


def test_callbacks_get_every_step_and_epoch(tmp_path):
    steps, epochs = [], []
    trainer = trainer_for(
        small_model(), folder=tmp_path, on_step=steps.append, on_epoch=epochs.append
    )
    results = trainer.fit(batches(3), batches(1), 2)
    assert epochs == results
    logged = log.read(tmp_path / log.FILE, "step")
    assert [
        {"kind": "step", "epoch": row["epoch"], **asdict(s)}
        for row, s in zip(logged, steps, strict=True)
    ] == logged


def test_what_fit_returns_shows_the_run_in_short():
    trainer = trainer_for(small_model())
    results = trainer.fit(batches(4), batches(1), 3)
    lines = dict(line.strip().split("  ", 1) for line in str(results).splitlines())
    assert lines["val accuracy"].strip() == f"{results[-1].val_accuracy:.2%} after 3 epochs"
    assert lines["skipped steps"].strip() == "0 of 12"
    assert lines["parameters"].strip() == f"{sum(p.numel() for p in trainer.model.parameters())}"
    assert lines["kernels"].strip() == "linear, loss, mix, orthogonalize, update (cpu)"
    assert "it/s" not in str(results)
    epochs = [
        EpochResult(n, 1.0, 1.0, accuracy, 1.0, 1.0) for n, accuracy in enumerate((2, 3, 3, 1))
    ]
    assert Results(epochs).best.epoch == 2


@pytest.mark.parametrize("validated", [True, False])
def test_a_report_of_the_run(tmp_path, validated):
    trainer = trainer_for(small_model(), folder=tmp_path, report=True, ema=0.5)
    before = trainer.model.training
    trainer.fit(batches(3), batches(2) if validated else None, 1)
    assert trainer.model.training == before
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert ("Confusion matrix" in page) == validated
    assert "<h1>Sequential</h1>" in page
    with pytest.raises(ValueError, match="report=True writes into the folder of the run, got fold"):
        trainer_for(small_model(), report=True)


def test_fp16_weights_without_a_loss_scale_are_refused():
    for scaler in (None, amp.GradScaler("cpu", enabled=False)):
        with pytest.raises(ValueError, match=r"fp16 weights need a loss scale.* or train in bf16"):
            trainer_for(small_model(torch.float16), scaler=scaler)
    trainer_for(small_model(torch.float16), scaler=amp.GradScaler("cpu"))


IN_A_TERMINAL = """
import time
import torch
from fastmp import amp
from tests.training.test_trainer import batches, small_model, trainer_for
half = [(x.half(), y) for x, y in batches(15)]
options = {"show": True, "on_step": lambda step: time.sleep(0.01)}  # a bar is drawn every 0.1 s
trainer = trainer_for(small_model(torch.float16), scaler=amp.GradScaler("cpu"), **options)
trainer.fit(half, half[:1], 10)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")
@pytest.mark.parametrize("columns", [80, 130])
def test_a_step_is_whole_in_a_terminal(columns):
    """In a terminal of its own: loss, lr, scale and samples/s fit beside the bar; no it/s."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL], stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # how Linux says that the other end has been closed
                break
    os.close(ours)
    assert process.returncode == 0, shown
    lines = [line for line in shown.decode().replace("\n", "\r").split("\r") if "epoch" in line]
    bars = [line for line in lines if " scale " in line]
    assert bars
    for line in bars:
        assert len(line) < columns
        assert line.rstrip().endswith(" samples/s")
        assert all(part in line for part in ("%", "loss ", "lr "))
    assert "it/s" not in "".join(lines)
    (last,) = [line for line in lines if line.startswith("epoch 10/10  loss")]
    assert len(last) <= 80
