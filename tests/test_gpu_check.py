"""gpu-check: a stage that fails or hangs does not keep the next one from running."""

import sys

from benchmarks import gpu_check


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
    assert (tmp_path / "endless.log").read_text() == "waits\n"
    summary = (tmp_path / "summary.md").read_text()
    for row in ("| broken | **fail** |", "| endless | **fail** |", "| sound | pass |"):
        assert row in summary


def test_the_library_is_found(tmp_path):
    found, words = gpu_check.library(tmp_path / "library.log")
    assert found
    assert words.startswith("libfastmp_cpu, instruction set")
