"""``make gpu-check RESULTS=dir``: everything on one GPU, offline, in under ten minutes.

Uses the native library or builds it, runs the tests on the device, measures what the kernels are
asked to reach and whole training steps, looks for races and stray accesses and runs the rest of
the suite. A stage that fails does not stop the next one; what took too long is cut, and said.
summary.md opens with the goals and what was reached; the figures lie in gpu.md, gpu.json and three
pictures, all that was said in stages.log. ``--only tune`` tries other tiles. ``--dry-run`` goes
through every stage without a GPU, small, in Triton's interpreter. Needs pytest and hypothesis, and
nothing else that does not come with torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.tools import measure

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
LIBRARY = ROOT / "fastmp" / "libfastmp_cpu.so"
LIMIT = 590.0  # seconds, for all stages that run unasked
Run = Callable[[Path, float], tuple[bool, str]]  # (log, seconds) -> whether it passed, and words


class Stage(NamedTuple):
    """Something to do, and the seconds that it may take."""

    seconds: float
    run: Run


class Done(NamedTuple):
    """A stage and what became of it."""

    name: str
    passed: bool
    seconds: float
    words: str


def command(arguments: list[str], log: Path, seconds: float) -> tuple[bool, str]:
    """Run it with its output at the end of a file; whether it succeeded, and its last line."""
    before = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as out:
        try:
            code = subprocess.run(
                arguments, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds:.0f} s"
        except OSError as error:
            return False, str(error)
    lines = log.read_bytes()[before:].decode(errors="replace").split("\n")
    words = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return code == 0, words.replace("|", "/")  # it goes into a table


def library(log: Path, seconds: float) -> tuple[bool, str]:
    """The installed library if it loads, else one built with CMake next to the package."""
    probe = [sys.executable, "-c", "import sys; from fastmp.backends import cpu; "
             "library, reason = cpu.load(); print(reason); sys.exit(library is None)"]  # fmt: skip
    found, words = command(probe, log, seconds)
    if found:
        return found, words
    build = ROOT / "build" / "gpu-check"
    for arguments in (
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build), "--parallel"],
    ):
        done, words = command(arguments, log, seconds)
        if not done:
            return False, words
    shutil.copy(build / LIBRARY.name, LIBRARY)
    return command(probe, log, seconds)


def tests(*paths: str) -> Run:
    """pytest on these paths; where pytest-xdist is there, in several processes that compile."""
    processes = str(min(os.cpu_count() or 1, 12))
    parallel = ["-n", processes] if importlib.util.find_spec("xdist") else []
    return partial(command, [*PYTEST, "-rs", *paths, *parallel])


def module(*arguments: str) -> Run:
    """python -m with these arguments."""
    return partial(command, [sys.executable, "-m", *arguments])


def sanitizer(log: Path, seconds: float) -> tuple[bool, str]:
    """NVIDIA's memcheck and racecheck on a few tests: each slows a kernel down a hundred times."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return True, "cut: compute-sanitizer is not installed"
    for kind in ("memcheck", "racecheck"):
        arguments = [tool, "--tool", kind, "--error-exitcode", "1", *PYTEST, *SANITIZED]
        done, words = command(arguments, log, seconds / 2)
        if not done:
            return False, f"{kind}: {words}"
    return True, "memcheck and racecheck found nothing"


# ---- the stages ----

DEVICE_TESTS = ["tests/kernels/gpu"]
SANITIZED = [
    "tests/kernels/gpu/test_operations.py",
    "-k",
    "three_runs",
]  # every kernel, a few times


def plan(results: Path) -> dict[str, Stage]:
    """The stages on a GPU; all but the last fit into ``LIMIT``."""
    device = [*DEVICE_TESTS, "tests/kernels/interpret"]
    return {
        "library": Stage(60, library),
        "device-tests": Stage(180, tests(*device)),
        "benchmarks": Stage(
            220, module("benchmarks.tools.measure", str(results), "--seconds", "200")
        ),
        "sanitizer": Stage(40, sanitizer),
        "other-tests": Stage(90, tests("tests", *(f"--ignore={path}" for path in device))),
        "tune": Stage(240, module("benchmarks.tools.tune", "--seconds", "200")),
    }


def dry_plan(results: Path) -> dict[str, Stage]:
    """The same stages where there is no GPU: the interpreter runs the kernels, small."""
    os.environ["TRITON_INTERPRET"] = "1"
    kernels = ["tests/kernels/interpret/test_mix.py", *DEVICE_TESTS, "-k", "out_of_range or gpu"]
    return {
        "library": Stage(60, library),
        "device-tests": Stage(180, tests(*kernels)),
        "benchmarks": Stage(
            220, module("benchmarks.tools.measure", str(results), "--seconds", "200")
        ),
        "sanitizer": Stage(40, sanitizer),
        "other-tests": Stage(90, tests("tests/backends/test_registry.py")),
        "tune": Stage(240, module("benchmarks.tools.tune", "--small")),
    }


def main() -> None:
    names = list(plan(Path()))
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("results", type=Path, help="where the results go; made if need be")
    parser.add_argument("--only", choices=names, help="this stage alone")
    parser.add_argument("--dry-run", action="store_true", help="every stage, without a GPU")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        sys.exit(
            "gpu-check needs an NVIDIA GPU that torch can see; --dry-run (make gpu-check "
            "ARGS=--dry-run) goes through its stages without one, `make test` needs none"
        )
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    stages = dry_plan(results) if options.dry_run else plan(results)
    # tuning is for when somebody asks: it alone takes minutes
    unasked = [name for name in names if name != "tune" or options.dry_run]
    chosen = [options.only] if options.only else unasked
    done = run({name: stages[name] for name in chosen}, results)
    sys.exit(not all(stage.passed for stage in done))


def run(stages: dict[str, Stage], results: Path, limit: float = LIMIT) -> list[Done]:
    """Every stage in turn, whatever became of the one before, until the time is up."""
    done: list[Done] = []
    log = results / "stages.log"
    log.unlink(missing_ok=True)
    (results / measure.GOALS).unlink(missing_ok=True)
    end = time.perf_counter() + limit
    for name, stage in stages.items():
        with log.open("a") as out:
            out.write(f"\n==== {name} ====\n")
        start = time.perf_counter()
        left = end - start
        passed, words = (
            stage.run(log, min(stage.seconds, left)) if left > 0 else (False, "cut: time was up")
        )
        done.append(Done(name, passed, time.perf_counter() - start, words))
        verdict = "pass" if passed else "FAIL"
        print(f"{name}: {verdict}, {done[-1].seconds:.0f} s: {words}", flush=True)
        write_summary(results, done)
    return done


def write_summary(results: Path, done: list[Done]) -> None:
    """summary.md: the goals and what was reached, then the machine, then the stages so far."""
    import torch

    from fastmp.doctor import environment

    goals = results / measure.GOALS
    reached = goals.read_text() if goals.exists() else "The goals were not measured.\n"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = "\n".join(f"- {key}: {value}" for key, value in environment(device).items())
    table = "\n".join(
        f"| {s.name} | {'pass' if s.passed else '**fail**'} | {s.seconds:.0f} | {s.words} |"
        for s in done
    )
    (results / "summary.md").write_text(
        f"# gpu-check\n\n{reached}\n{facts}\n\n"
        f"| stage | | seconds | |\n| --- | --- | --- | --- |\n{table}\n"
    )


if __name__ == "__main__":
    main()
