"""fastmp train: accumulation, schedules, transfer, image folders, resuming."""

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli, recipe
from fastmp.training import log
from tests.cli.runs import FAST, newest, run
from tests.data.image_cases import write


def test_accumulate_and_schedule(tmp_path):
    _, steps = run(tmp_path, "--accumulate", "5", "--schedule", "constant", "--warmup", "0.4")
    assert len(steps) == 2 * 5  # 22 batches an epoch: four groups of 5 and one of 2
    assert [row["lr"] / steps[-1]["lr"] for row in steps[:5]] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


def test_a_batch_larger_than_the_data(tmp_path, capsys):
    _, one = run(tmp_path, "--batch-size", "100000", name="one")
    shown = capsys.readouterr().out
    assert "global batch: 1,433, all that the data has for the 100,000 of the settings" in shown
    assert "one step an epoch, 2 in all: a smaller --batch-size than 100,000 gives more" in shown
    _, two = run(tmp_path, "--batch-size", "1433", name="two")
    assert one == two  # the lr too
    assert "all that the data has" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "keys", "dtype"),
    [
        ("bf16", ["exp_avg", "exp_avg_sq"], torch.bfloat16),
        ("8bit", ["exp_avg_8bit", "exp_avg_sq_8bit"], torch.uint8),
    ],
)
def test_the_kind_of_the_moments(tmp_path, name, keys, dtype):
    folder, _ = run(tmp_path, "--state-dtype", name, "--ema", "0.9")
    saved = newest(folder)
    states = saved["optimizer"]["state"].values()
    largest = max(states, key=lambda own: max(value.numel() for value in own.values()))
    assert [largest[key].dtype for key in keys] == [dtype, dtype]
    assert "average" not in largest  # it is in the checkpoint by the model's names
    assert saved["ema"].keys() == saved["model"].keys()


def test_remainders_of_fp16_weights(tmp_path):
    whole, _ = run(tmp_path, "--dtype", "fp16", name="whole")
    split, _ = run(tmp_path, "--dtype", "fp16", "--master", "split", name="split")
    states = [newest(folder)["optimizer"]["state"].values() for folder in (whole, split)]
    kept = [{key for own in saved for key in own} for saved in states]
    assert kept[0] - kept[1] == {"master"}
    assert kept[1] - kept[0] == {"remainder_fp16"}


def test_cosine_and_cyclic(tmp_path):
    _, cosine = run(tmp_path, "--schedule", "cosine", "--lr", "1", "--warmup", "0.5", name="a")
    rates = [row["lr"] for row in cosine]
    assert max(rates) == rates[22] == 1.0
    assert rates[:22] == sorted(rates[:22])
    assert rates[-1] < 0.01
    _, cyclic = run(tmp_path, "--schedule", "cyclic", "--lr", "1", "--cycles", "2", name="b")
    rates = [row["lr"] for row in cyclic]
    peaks = [b for a, b, c in zip(rates, rates[1:], rates[2:], strict=False) if a < b > c]
    assert peaks == pytest.approx([1.0, 0.52])  # half of the range above 1/25


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


def test_images_from_a_folder(tmp_path, capsys):
    write(tmp_path / "pets", ("train", "val"))
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").touch()
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "pets"), "--image-size", "8", "--workers", "0"]
    assert cli.main(["train", *FAST, *flags, "--batch-size", "4", "--out", str(out)]) == 0
    assert len(log.read(out / "metrics.jsonl", "step")) == 4
    assert recipe.read_toml(out / "config.toml").image_size == 8
    assert capsys.readouterr().out.count("files that are no images: 1 (cat/notes.txt)\n") == 1


def test_resuming_needs_the_folder_of_a_run(tmp_path, capsys):
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
