"""gpu-check: a stage that fails or hangs does not keep the next one from running."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check, tune
from fastmp.backends.triton import tiles

ROOT = Path(__file__).parent.parent


def python(code, seconds=60):
    return lambda log: gpu_check.command([sys.executable, "-c", code], log, seconds)


def test_every_stage_runs_and_is_reported(tmp_path):
    plan = [
        ("broken", python("print('started'); raise SystemExit('something broke')")),
        ("endless", python("print('waits', flush=True); import time; time.sleep(60)", 2)),
        ("missing", lambda log: gpu_check.command(["/no/such/program"], log, 2)),
        ("sound", python("print('all is well')")),
    ]
    stages = gpu_check.run(plan, tmp_path)
    assert [stage.passed for stage in stages] == [False, False, False, True]
    assert [stage.words for stage in stages[:2]] == ["something broke", "stopped after 2 s"]
    assert stages[3].words == "all is well"
    assert "==== endless ====\nwaits\n" in (tmp_path / "stages.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    for row in ("| broken | **fail** |", "| endless | **fail** |", "| sound | pass |"):
        assert row in summary


def test_the_library_is_found(tmp_path):
    found, words = gpu_check.library(tmp_path / "library.log")
    assert found
    assert words.startswith("libfastmp_cpu, instruction set")


def test_a_dry_run_goes_through_every_stage(tmp_path):
    """Without a GPU: the interpreter stands in for it; few files are left."""
    pytest.importorskip("triton", reason="Triton is not installed: no interpreter to stand in")
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "stages.log").read_text()[-3000:]
    for stage in gpu_check.plan(tmp_path):
        assert f"{stage}: pass" in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8


def test_one_stage_alone(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--dry-run"]
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
