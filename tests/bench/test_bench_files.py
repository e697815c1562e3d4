"""What fastmp bench writes, and the command."""

import json
import subprocess
import sys

import pytest

from fastmp import cli
from fastmp.bench import pictures, results, subjects
from fastmp.bench.harness import Case, Row, Timing
from tests.bench.bench_cases import row

# ---- files ----


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    where = tmp_path_factory.mktemp("results")
    curves = {"fastmp": [(0.1, 0.5), (0.2, 0.8)], "AMP": [(0.2, 0.5), (0.4, 0.8)]}
    timings = {"fastmp": Timing(200, 200, 200), "AMP": Timing(400, 400, 400)}
    rows = [
        row("small", 1.0, "loss, float32", eager=2.0, compiled=1.5),
        row("large", 4.0, "loss, float32", eager=9.0),
        Row("train", "mlp to 80%", timings, curves=curves, notes="after 2 steps"),
    ]
    results.write("everything", rows, 12.5, where, "cpu")
    results.draw("everything", rows, 12.5, where, "cpu")
    return where, rows


def test_results_name_device_date_versions_and_commit(written):
    where, rows = written
    content = json.loads((where / "everything.json").read_text())
    assert {"device", "date", "fastmp", "commit", "torch", "python", "backend"} <= set(content)
    assert [r["ratios"] for r in content["rows"]] == [r.ratios for r in rows]
    text = (where / "everything.md").read_text()
    for word in ("- device: ", "- date: 20", "- commit: ", "- torch: 2", "12.5 GB/s", "**1.50x**"):
        assert word in text
    assert "mlp to 80%: after 2 steps" in text


def test_there_is_a_picture_of_each_kind(written):
    where, _ = written
    from matplotlib import image

    for name in ("everything", "everything-bandwidth", "everything-accuracy"):
        pixels = image.imread(where / f"{name}.png")
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05  # not blank


def test_no_picture_of_what_is_not_there(tmp_path):
    rows = [row("alone", 1.0, "a series", eager=2.0)]
    results.draw("few", rows, 1.0, tmp_path, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["few.png"]
    pictures.accuracy(tmp_path / "none.png", "none", rows)
    assert not (tmp_path / "none.png").exists()


def test_the_folder_is_named_after_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "device_name", lambda device: "NVIDIA H200 (SXM)")
    assert results.folder(tmp_path, "cuda") == tmp_path / "nvidia-h200-sxm"
    assert (tmp_path / "nvidia-h200-sxm").is_dir()


# ---- the command ----


def test_fastmp_bench_times_and_writes(tmp_path, monkeypatch, capsys):
    made = [Case("sound", lambda: [row("a sound case", eager=2.0)])]
    monkeypatch.setitem(subjects.SUBJECTS, "loss", lambda device, quick: made)
    assert cli.main(["bench", "loss", "--out", str(tmp_path), "--device", "cpu"]) == 0
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["loss.json", "loss.md", "loss.png"]
    assert "| a sound case |" in capsys.readouterr().out


def test_a_benchmark_that_fails_is_an_error_and_the_rest_is_written(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such kernel")

    made = [Case("broken", broken), Case("sound", lambda: [row("a sound case", eager=2.0)])]
    monkeypatch.setitem(subjects.SUBJECTS, "loss", lambda device, quick: made)
    assert cli.main(["bench", "loss", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "fastmp bench: failed: broken" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/loss.md"))) == 1


@pytest.mark.slow
def test_quick_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "fastmp", "bench", "optimizer", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| whole step, float16, 50 x 1,000 |" in done.stdout
    assert list(tmp_path.iterdir()) == []
