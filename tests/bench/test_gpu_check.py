"""gpu-check: a stage that fails or hangs does not keep the next one from running."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.tools import gpu_check, measure, tune
from fastmp.backends.triton import tiles
from fastmp.bench.harness import Case, Row, Timing
from fastmp.bench.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]


def python(code, seconds=60):
    return gpu_check.Stage(seconds, partial(gpu_check.command, [sys.executable, "-c", code]))


def test_every_stage_runs_and_is_reported(tmp_path):
    plan = {
        "broken": python("print('started'); raise SystemExit('something broke')"),
        "endless": python("print('waits', flush=True); import time; time.sleep(60)", 2),
        "missing": gpu_check.Stage(2, partial(gpu_check.command, ["/no/such/program"])),
        "sound": python("print('all is well')"),
    }
    stages = gpu_check.run(plan, tmp_path)
    assert [stage.passed for stage in stages] == [False, False, False, True]
    assert [stage.words for stage in stages[:2]] == ["something broke", "stopped after 2 s"]
    assert stages[3].words == "all is well"
    assert "==== endless ====\nwaits\n" in (tmp_path / "stages.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    for row in ("| broken | **fail** |", "| endless | **fail** |", "| sound | pass |"):
        assert row in summary


def test_what_no_time_is_left_for_is_cut_and_said(tmp_path):
    plan = {"long": python("import time; time.sleep(60)"), "late": python("print('ran')")}
    long, late = gpu_check.run(plan, tmp_path, limit=0.5)
    assert long.words == "stopped after 0 s"
    assert (late.passed, late.words) == (False, "cut: time was up")


def test_the_stages_fit_into_ten_minutes(tmp_path):
    stages = gpu_check.plan(tmp_path)
    assert sum(stage.seconds for name, stage in stages.items() if name != "tune") <= 590
    assert list(stages) == list(gpu_check.dry_plan(tmp_path))


def row(ratio, goals, **about):
    timings = {"fastmp": Timing(1, 1, 1), "torch.mm": Timing(ratio, ratio, ratio)}
    return Row("linear", f"plain, {ratio}", timings, goals=goals, **about)


def test_the_summary_opens_with_the_goals(tmp_path):
    """Reached, missed, failed and cut, each in a line of its own."""

    def broken():
        raise RuntimeError("no such kernel")

    cases = [
        Case("one", lambda: [row(2.0, {"best": 1.5}, bytes_moved=10**9, share=0.9)]),
        Case("two", lambda: [row(0.5, {"torch.mm": 1.25})]),
        Case("three", broken),
    ]
    bad = measure.measure([*cases, Case("late", broken)], tmp_path, "cpu", 60)
    assert bad[-2:] == ["three", "late"]
    measure.measure([*cases, Case("late", broken)][2:], tmp_path, "cpu", 0)
    assert (tmp_path / measure.GOALS).read_text().splitlines()[2:] == [
        "| three | - | **error** |",
        "| late | not measured | cut |",
    ]
    measure.measure(cases[:2], tmp_path, "cpu", 60)
    gpu_check.write_summary(tmp_path, [gpu_check.Done("library", True, 1.0, "there")])
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[:5] == [
        "# gpu-check",
        "",
        "| goal | measured | |",
        "| --- | --- | --- |",
        "| plain, 2.0: 1.5x torch.mm | 2.00x | pass |",
    ]
    assert "| plain, 2.0: 90% of a copy | " in lines[5]
    assert lines[6] == "| plain, 0.5: 1.25x torch.mm | 0.50x | **fail** |"
    assert lines[7] == ("| plain products, geometric mean of 2: 0.98x torch.mm | 1.000x | pass |")
    assert "| library | pass | 1 | there |" in lines


def test_it_measures_with_nothing_but_torch(tmp_path):
    """A GPU machine without a network has no tqdm, matplotlib or tyro: no picture, but figures."""
    code = (
        "import sys, pathlib\n"
        "for name in ('tqdm', 'matplotlib', 'tyro', 'tensorboard', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.tools import measure\n"
        "from fastmp.bench.subjects import SUBJECTS\n"
        f"cases = SUBJECTS['optimizer']('cpu', True)[:1]\n"
        f"sys.exit(len(measure.measure(cases, pathlib.Path({str(tmp_path)!r}), 'cpu', 60)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no pictures: they need matplotlib" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["goals.md", "gpu.json", "gpu.md"]


def test_the_library_is_found(tmp_path):
    found, words = gpu_check.library(tmp_path / "library.log", 60)
    assert found
    assert words.startswith("libfastmp_cpu, instruction set")


def test_a_dry_run_goes_through_every_stage(tmp_path):
    """Without a GPU: the interpreter stands in for it; few files are left."""
    pytest.importorskip("triton", reason="Triton is not installed: no interpreter to stand in")
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "stages.log").read_text()[-3000:]
    for stage in gpu_check.plan(tmp_path):
        assert f"{stage}: pass" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["subject"] for row in rows} == set(SUBJECTS)


def test_one_stage_alone(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tools.gpu_check", str(tmp_path), "--dry-run"]
    done = subprocess.run(
        [*command, "--only", "library"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("library: pass")
    assert "tests" not in done.stdout


# ---- tuning ----


def tuned(times, monkeypatch):
    """What ``best`` finds if the tiles take so many milliseconds."""
    module = SimpleNamespace(tile=lambda: (0,))

    def interleave(runs, *_):
        return {name: SimpleNamespace(median=times[run()[0]]) for name, run in runs.items()}

    monkeypatch.setattr(tune, "interleave", interleave)

    def check(tile):
        assert tile != (9,), "wrong"
        if tile == (8,):
            raise RuntimeError("out of resource: shared memory")

    tiles = [(n,) for n in times if n]
    case = (lambda: module.tile(), check)
    found = tune.best("row", module, "tile", (0,), tiles, [case], time.perf_counter() + 60)
    assert module.tile() == (0,)  # put back
    return found


def test_tuning_finds_the_fastest_that_is_right(monkeypatch, capsys):
    found = tuned({0: 4.0, 1: 5.0, 2: 2.0, 8: 1.0, 9: 1.0}, monkeypatch)
    assert (found.tile, found.ratio, found.tried, found.wrong) == ((2,), 2.0, 4, 1)
    assert str(found) == "row: -> (2,), 2.00x (4 tried)"
    said = capsys.readouterr().err
    assert "(8,) does not run: out of resource" in said
    assert "(9,) gives wrong results: wrong" in said


def test_a_tile_that_is_hardly_faster_is_not_worth_it(monkeypatch):
    assert str(tuned({0: 4.0, 1: 3.95}, monkeypatch)) == "row: stays (1 tried)"


def test_candidates_differ_from_the_tile_and_can_be():
    for rows, depth in ((16, 4096), (4096, 1024), (4096, 8192)):
        for architecture in (80, 90, 100, 120):
            tile = tiles.linear_tile(rows, depth, architecture)
            made = tune.linear_candidates(tile)
            assert len(made) == len(set(made)) > 8
            assert tile not in made
    for classes in (10, 1000, 32000):
        tile = tiles.loss_tile(classes, 2)
        assert tile not in tune.loss_candidates(tile)
        assert all(t.programs > 0 and t.warps > 0 for t in tune.loss_candidates(tile))
