"""The command line: schedules, transfer, data of one's own, resuming, the range test."""

from __future__ import annotations

import html.parser

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli, recipe
from fastmp.recipe import TrainConfig
from fastmp.training import log
from tests.cli.test_train import FAST, newest, run
from tests.data.test_files import write


def test_a_rate_is_scaled_to_the_global_batch():
    adam = TrainConfig(base_lr=1e-3, batch_size=256, accumulate=2)
    assert adam.resolved(8).lr == pytest.approx(1e-3 * 4)  # the root of 16
    sgd = TrainConfig(optimizer="sgd", batch_size=256)
    assert sgd.resolved(8).lr == pytest.approx(0.8)
    assert TrainConfig(lr=0.5, batch_size=999).resolved(8).lr == 0.5
    with pytest.raises(recipe.ConfigError, match=r"lr, base_lr: expected one of them, got 0.1 and"):
        TrainConfig(lr=0.1, base_lr=0.2).resolved()


def test_a_flag_overrides_the_other_rate_of_the_file(tmp_path):
    out, _ = run(tmp_path, "--base-lr", "0.002", name="one")
    written = recipe.read_toml(out / "config.toml")
    assert (written.base_lr, written.lr) == (0.002, None)
    command = ["train", "--config", str(out / "config.toml"), "--lr", "0.5", "--epochs", "1"]
    assert cli.main([*command, "--out", str(tmp_path / "two")]) == 0
    written = recipe.read_toml(tmp_path / "two" / "config.toml")
    assert (written.base_lr, written.lr) == (None, 0.5)


def test_cosine_and_cyclic(tmp_path):
    _, cosine = run(tmp_path, "--schedule", "cosine", "--lr", "1", "--warmup", "0.5", name="a")
    rates = [row["lr"] for row in cosine]
    assert max(rates) == rates[22] == 1.0
    assert rates[:22] == sorted(rates[:22])
    assert rates[-1] < 0.01
    _, cyclic = run(tmp_path, "--schedule", "cyclic", "--lr", "1", "--cycles", "2", name="b")
    rates = [row["lr"] for row in cyclic]
    peaks = [b for a, b, c in zip(rates, rates[1:], rates[2:], strict=False) if a < b > c]
    assert peaks == pytest.approx([1.0, 0.52])  # half of what is above the foot, 1/25


def test_transfer_and_frozen_layers(tmp_path, capsys):
    first, _ = run(tmp_path, name="first")
    before = newest(first)["model"]
    flags = ["--init-from", str(first), "--freeze", "1", "--layer-decay", "0.5"]
    second, _ = run(tmp_path, *flags, name="second")
    assert f"{first}: 6 loaded" in capsys.readouterr().out
    after = newest(second)["model"]
    assert torch.equal(before["1.weight"], after["1.weight"])
    assert not torch.equal(before["3.weight"], after["3.weight"])
    written = recipe.read_toml(second / "config.toml")
    assert (written.freeze, written.layer_decay) == (("1",), 0.5)
    third, _ = run(tmp_path, "--init-from", str(first), "--unfreeze-every", "5", name="third")
    after = newest(third)["model"]
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert moved == ["5.weight", "5.bias"]


def test_images_of_ones_own(tmp_path):
    write(tmp_path / "pets", ("train", "val"))
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "pets"), "--image-size", "8", "--workers", "0"]
    assert cli.main(["train", *FAST, *flags, "--batch-size", "4", "--out", str(out)]) == 0
    assert len(log.read(out / "metrics.jsonl", "step")) == 4
    assert recipe.read_toml(out / "config.toml").image_size == 8


class Tags(html.parser.HTMLParser):
    """Whether every tag is closed, the text and the links."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], "", []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_whole_file(tmp_path):
    out, _ = run(tmp_path, "--telemetry", "--model", "mlp", "--dtype", "fp16")
    page = Tags()
    page.feed((out / "report.html").read_text())
    assert page.open == []
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for part in ("mlp on digits, fp16", "test accuracy", "label_smoothing = 0.1", "updates lost"):
        assert part in page.text
    if not log.read(out / "metrics.jsonl", "overflow"):
        assert "every gradient of every step was finite" in page.text


def test_resuming_needs_a_folder_and_one_of_ours(tmp_path, capsys):
    assert cli.main(["train", *FAST, "--resume"]) == 2
    assert "resume: expected --out with the folder of the run" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("not a run")
    assert cli.main(["train", *FAST, "--out", str(tmp_path), "--resume"]) == 2
    assert "expected the folder of a run, with config.toml" in capsys.readouterr().err
    out, steps = run(tmp_path, "--lr", "0.01", name="run")
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    more = log.read(out / "metrics.jsonl", "step")
    assert more[: len(steps)] == steps
    assert len(more) == len(steps) * 3 // 2
    assert cli.main(["train", *FAST, "--out", str(out)]) == 2
    assert "--resume goes on with the run that is there" in capsys.readouterr().err


def test_lr_find(tmp_path, capsys):
    picture = tmp_path / "curve.png"
    flags = ["--model", "mlp", "--dtype", "fp32", "--steps", "60", "--picture", str(picture)]
    assert cli.main(["lr-find", *flags]) == 0
    shown = capsys.readouterr().out
    suggestion = float(shown.split("--lr ")[1].split()[0])
    assert 1e-5 < suggestion < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
