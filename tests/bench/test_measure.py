"""The stage that measures: cases compile side by side, are timed one by one, and end in goals."""

import multiprocessing
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.tools import gpu_check, measure
from fastmp.bench import subjects
from fastmp.bench.harness import Case
from tests.bench.measure_cases import case, row

ROOT = Path(__file__).parents[2]


def makes(log, **endings):
    return {name: partial(case, log, name, ending) for name, ending in endings.items()}


def test_cases_compile_side_by_side_and_are_timed_one_by_one(tmp_path):
    """One that fails or crashes costs its own rows; the third waits for a process."""
    log = tmp_path / "log"
    cases = makes(log, one="rows", two="error", three="crash", four="rows")
    found = dict(measure.side_by_side(cases, 300, processes=3))
    assert list(found) == list(cases)
    assert [rows is not None for rows in found.values()] == [True, False, False, True]
    assert found["one"][0].ratio == 2.0
    events = log.read_text().splitlines()
    assert sorted(events[:3]) == ["compile one", "compile three", "compile two"]
    assert events[3:] == ["begin one", "end one", "begin three", "compile four", "begin four",
                          "end four"]  # fmt: skip


def test_a_case_that_compiles_long_pauses_while_others_are_timed(tmp_path, capsys):
    """It goes on afterwards; one that never ends has failed, and is no obstacle."""
    log = tmp_path / "log"
    cases = makes(log, hangs="hang", slow="slow", quick="rows")
    found = dict(measure.side_by_side(cases, 300, 3, round_seconds=6, compile_seconds=24))
    assert list(found) == ["quick", "slow", "hangs"]
    assert [rows is not None for rows in found.values()] == [True, True, False]
    assert "hangs: it takes too long" in capsys.readouterr().err
    events = log.read_text().splitlines()
    turn = events.index("begin quick")
    assert events[turn - 1 : turn + 2] == ["compile slow", "begin quick", "end quick"]
    assert events[-2:] == ["begin slow", "end slow"]


def test_a_case_after_the_time_is_cut(tmp_path):
    before = set(multiprocessing.active_children())  # of other tests in this process
    timed = measure.side_by_side(makes(tmp_path / "log", hangs="hang", late="rows"), 1, 1)
    measure.measure(["hangs", "late"], timed, 1.0, tmp_path, "cpu")
    assert set(multiprocessing.active_children()) <= before
    lines = (tmp_path / measure.GOALS).read_text().splitlines()
    assert lines[2:] == ["| hangs | not measured | cut |", "| late | not measured | cut |"]


def test_the_summary_opens_with_the_goals(tmp_path, capsys):
    """Reached, missed, failed and cut, each in a line of its own."""

    def broken():
        raise RuntimeError("no such kernel")

    cases = [
        Case("one", lambda: [row(2.0, {"best": 1.5}, bytes_moved=10**9, copy_fraction=0.9)]),
        Case("two", lambda: [row(0.5, {"torch.mm": 1.25})]),
        Case("three", broken),
    ]
    names = ["one", "two", "three", "late"]
    bad = measure.measure(names, subjects.run(cases), 2000.0, tmp_path, "cpu")
    assert bad == ["plain, 2.0: 90% of a copy", "plain, 0.5: 1.25x torch.mm", "three"]
    assert "2 of 4 goals reached, 1 cases failed, cut: late" in capsys.readouterr().out
    gpu_check.write_summary(tmp_path, [gpu_check.Done("library", True, 1.0, "there")])
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[:10] == [
        "# gpu-check",
        "",
        "| goal | measured | |",
        "| --- | --- | --- |",
        "| plain, 2.0: 1.5x torch.mm | 2.00x | pass |",
        "| plain, 2.0: 90% of a copy | 50% | **fail** |",
        "| plain, 0.5: 1.25x torch.mm | 0.50x | **fail** |",
        "| plain products, geometric mean of 2: 0.98x torch.mm, device time | 1.000x | pass |",
        "| three | - | **error** |",
        "| late | not measured | cut |",
    ]
    assert "| library | pass | 1 | there |" in lines


def test_it_measures_with_nothing_but_torch(tmp_path):
    """A GPU machine without a network has no tqdm, matplotlib or tyro: no picture, but figures."""
    code = (
        "import sys, pathlib\n"
        "for name in ('tqdm', 'matplotlib', 'tyro', 'tensorboard', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.tools import measure\n"
        "from fastmp.bench.subjects import SUBJECTS, run\n"
        "cases = SUBJECTS['optimizer']('cpu', True)[:1]\n"
        f"where = pathlib.Path({str(tmp_path)!r})\n"
        "bad = measure.measure([case.name for case in cases], run(cases), 10.0, where, 'cpu')\n"
        "sys.exit(len(bad))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no pictures: they need matplotlib" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["goals.md", "gpu.json", "gpu.md"]


def test_the_goals_that_matter_come_first():
    names = [
        f"{subject}: {case.name}"
        for subject, make in subjects.SUBJECTS.items()
        for case in make("cuda", False)
    ]
    placed = [measure.place(name) for name in names]
    assert set(range(len(measure.ORDER))) <= set(placed)
    last = [name for name, place in zip(names, placed, strict=True) if place == len(measure.ORDER)]
    assert all("accuracy" in name or name.startswith("scaling") for name in last)


def test_cases_are_chosen_by_a_pattern():
    """Any of its places in a name; in the order of the goals."""
    makes = dict.fromkeys(["linear: plain_case (1, 2)", "loss: 8 x 10", "train: GPT-2"], case)
    found = measure.in_order(makes, re.compile("plain|GPT"))
    assert list(found) == ["train: GPT-2", "linear: plain_case (1, 2)"]


def test_every_case_has_a_name_of_its_own():
    for subject, make in subjects.SUBJECTS.items():
        if subject != "scaling":  # counts the GPUs
            names = [case.name for case in make("cuda", False)]
            assert len(names) == len(set(names))
