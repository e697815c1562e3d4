"""gpu-check: every stage runs, also after one that failed, and leaves no process."""

import json
import subprocess
import sys
import time
from contextlib import chdir
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.tools import gpu_check, tune
from fastmp.backends.triton import tiles
from fastmp.bench.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]


def python(code, seconds=60):
    return gpu_check.Stage(seconds, partial(gpu_check.command, [sys.executable, "-c", code]))


def test_every_stage_runs_and_is_reported(tmp_path):
    plan = {
        "endless": python("print('waits', flush=True); import time; time.sleep(60)", 2),
        "broken": python("print('started'); raise SystemExit('something broke')"),
        "missing": gpu_check.Stage(2, partial(gpu_check.command, ["/no/such/program"])),
        "sound": python("print('all is well')"),
    }
    stages = gpu_check.run(plan, tmp_path)
    assert [stage.passed for stage in stages] == [False, False, False, True]
    assert [stage.line for stage in stages[:2]] == ["stopped after 2 s", "something broke"]
    assert stages[3].line == "all is well"
    assert "==== endless ====\nwaits\n" in (tmp_path / "stages.log").read_text()
    summary = (tmp_path / "summary.md").read_text()
    for row in ("| broken | **fail** |", "| endless | **fail** |", "| sound | pass |"):
        assert row in summary


def test_a_stage_without_time_is_cut(tmp_path):
    plan = {"long": python("import time; time.sleep(60)"), "late": python("print('ran')")}
    long, late = gpu_check.run(plan, tmp_path, limit=0.5)
    assert long.line == "stopped after 0 s"
    assert (late.passed, late.line) == (False, "cut: time was up")


def test_a_stage_uses_what_others_left_over(tmp_path):
    plan = {
        "quick": python("print('ran')", 60),
        "long": python("import time; time.sleep(0.5)", 0.1),
    }
    assert [stage.passed for stage in gpu_check.run(plan, tmp_path)] == [True, True]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ending", ["", "import time; time.sleep(60)"], ids=["ends", "cut"])
def test_a_stages_processes_end_with_it(tmp_path, ending):
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"print(child.pid, flush=True)\n{ending}"
    )
    gpu_check.run({"stage": python(code, 3)}, tmp_path)
    pid = int((tmp_path / "stages.log").read_text().split()[-1])
    end = time.perf_counter() + 10
    while is_running(pid) and time.perf_counter() < end:
        time.sleep(0.01)
    assert not is_running(pid)


def test_cases_end_with_the_stage_that_measures(tmp_path):
    """They lead groups of their own, which a signal to the stage's group does not reach."""
    code = (
        "import os, pathlib, time\n"
        "from functools import partial\n"
        "from benchmarks.tools import measure\n"
        "from tests.bench.measure_cases import case\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "print(measure.start('it', partial(case, log, 'it', 'hang')).process.pid, flush=True)\n"
        "while not log.exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    gpu_check.run({"stage": python(code)}, tmp_path)
    pid = int((tmp_path / "stages.log").read_text().split()[-1])
    end = time.perf_counter() + 10
    while is_running(pid) and time.perf_counter() < end:
        time.sleep(0.01)
    assert not is_running(pid)


def test_the_stages_fit_into_400_seconds(tmp_path):
    stages = gpu_check.plan(tmp_path)
    assert sum(stage.seconds for name, stage in stages.items() if name != "tune") <= 400
    assert list(stages) == list(gpu_check.dry_plan(tmp_path))


def collected(*arguments):
    """The tests that these arguments of pytest select."""
    items = []

    class Collector:
        def pytest_collection_finish(self, session):
            items.extend(session.items)

    chosen = ["--collect-only", *arguments]
    with chdir(ROOT):
        assert pytest.main([*chosen, "-p", "no:cacheprovider"], plugins=[Collector()]) == 0
    return items


def test_the_tests_of_40_gb_run_alone():
    items = collected(gpu_check.GPU_TESTS, "-k", gpu_check.LARGE)
    assert {item.originalname for item in items} == {
        "test_loss_of_more_than_2_31_logits",
        "test_linear_of_more_than_2_31_results",
        "test_mix_of_more_than_2_31_bytes",
        "test_more_than_2_to_the_31_elements",
    }


def test_the_sanitizers_see_the_step_and_every_operation():
    names = [item.name for item in collected(*gpu_check.SANITIZED)]
    for test in ("three_runs_give_the_same_bits[loss", "three_runs_give_the_same_bits[gelu",
                 "three_runs_give_the_same_bits[mixup", "clipped_steps_equal_torchs"):  # fmt: skip
        assert any(test in name for name in names), names
    assert len(names) <= 8  # a minute for both sanitizers


def test_the_library_is_found(tmp_path):
    loads, line = gpu_check.library(tmp_path / "library.log", 60)
    assert loads
    assert line.startswith("libfastmp_cpu, instruction set")


@pytest.mark.slow
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
    for m, k in ((16, 4096), (4096, 1024), (4096, 8192)):
        for architecture in (80, 90, 100, 120):
            tile = tiles.linear_tile(m, k, architecture)
            made = tune.linear_candidates(tile)
            assert len(made) == len(set(made)) > 8
            assert tile not in made
    for classes in (10, 1000, 32000):
        tile = tiles.loss_tile(classes)
        assert tile not in tune.loss_candidates(tile)
        assert all(t.programs > 0 and t.warps > 0 for t in tune.loss_candidates(tile))
