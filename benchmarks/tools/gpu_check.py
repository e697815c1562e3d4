"""``make gpu-check RESULTS=dir``: everything on one GPU, offline, in at most 400 seconds.

Uses the native library or builds it, runs the tests on the device, times every case of the
benchmarks, and looks for races and stray accesses. A stage that fails does not stop the next one;
a stage that takes too long is cut, with all its processes. summary.md opens with the goals; the
figures are in gpu.md, gpu.json and pictures, the output of all stages in stages.log. ``--only``
runs one stage; ``--only tune`` tries other tiles. ``--dry-run`` goes through every stage without a
GPU, small, in Triton's interpreter. Needs pytest and hypothesis, and nothing else that does not
come with torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.tools import measure

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
LIBRARY = ROOT / "fastmp" / "libfastmp_cpu.so"
LIMIT = 400.0  # seconds, of all stages but tune
Run = Callable[[Path, float], tuple[bool, str]]  # (log, seconds) -> whether it passed, one line


class Stage(NamedTuple):
    """A stage, and the seconds that it may take, with those that earlier stages left over."""

    seconds: float
    run: Run


class Done(NamedTuple):
    """The outcome of a stage."""

    name: str
    passed: bool
    seconds: float
    line: str


def command(arguments: list[str], log: Path, seconds: float) -> tuple[bool, str]:
    """Run it with its output appended to a file; whether it succeeded, and its last line."""
    before = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("a") as out:
        try:
            process = subprocess.Popen(
                arguments, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return False, str(error)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds:.0f} s"
        finally:  # workers that outlive their parent would hold the GPU's memory
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_bytes()[before:].decode(errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return code == 0, line.replace("|", "/")  # it goes into a table


# ---- stages ----


def library(log: Path, seconds: float) -> tuple[bool, str]:
    """The installed library if it loads, else one built with CMake next to the package."""
    probe = [sys.executable, "-c", "import sys; from fastmp.backends import cpu; "
             "library, reason = cpu.load(); print(reason); sys.exit(library is None)"]  # fmt: skip
    loads, line = command(probe, log, seconds)
    if loads:
        return loads, line
    build = ROOT / "build" / "gpu-check"
    for arguments in (
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build), "--parallel"],
    ):
        built, line = command(arguments, log, seconds)
        if not built:
            return False, line
    shutil.copy(build / LIBRARY.name, LIBRARY)
    return command(probe, log, seconds)


def suite(*arguments: str, parallel: bool = True) -> Run:
    """pytest; where pytest-xdist is installed, in several processes, which compile in parallel."""
    processes: list[str] = []
    if parallel and importlib.util.find_spec("xdist"):
        processes = ["-n", str(min(os.cpu_count() or 1, 12))]
    return partial(command, [*PYTEST, "-rs", *arguments, *processes])


def module(*arguments: str) -> Run:
    """python -m with these arguments and ``--seconds``, a few less than the stage has."""

    def run(log: Path, seconds: float) -> tuple[bool, str]:
        limit = str(max(seconds - 10, 1))
        return command([sys.executable, "-m", *arguments, "--seconds", limit], log, seconds)

    return run


def sanitizer(log: Path, seconds: float) -> tuple[bool, str]:
    """NVIDIA's memcheck and racecheck on a few tests: each slows a kernel down a hundred times."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return True, "cut: compute-sanitizer is not installed"
    kinds = {
        # cuda.bindings looks up functions that a driver may lack: no error of ours
        "memcheck": ["--report-api-errors", "no"],
        "racecheck": [],
    }
    for kind, options in kinds.items():
        options = ["--tool", kind, "--error-exitcode", "1", *options]
        # each tensor an allocation of its own: memcheck sees an access beyond its end
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        passed, line = command([*uncached, tool, *options, *PYTEST, *SANITIZED], log, seconds / 2)
        if not passed:
            return False, f"{kind}: {line}"
    return True, "memcheck and racecheck found nothing"


GPU_TESTS = "tests/kernels/gpu"
LARGE = "more_than_2"  # 40 GB each: one at a time
# A step, and each operation in both of its kernels where it has two.
SANITIZED = [
    GPU_TESTS,
    "-k",
    "clipped_steps or (three_runs and (number or gelu or mixup))",
]


def plan(results: Path) -> dict[str, Stage]:
    """The stages on a GPU; all but tune fit into ``LIMIT``."""
    return {
        "library": Stage(40, library),
        "device-tests": Stage(
            110, suite(GPU_TESTS, "tests/kernels/interpret", "-k", f"not {LARGE}")
        ),
        "large-tests": Stage(30, suite(GPU_TESTS, "-k", LARGE, parallel=False)),
        "benchmarks": Stage(165, module("benchmarks.tools.measure", str(results))),
        "sanitizer": Stage(55, sanitizer),
        "tune": Stage(240, module("benchmarks.tools.tune")),
    }


def dry_plan(results: Path) -> dict[str, Stage]:
    """The same stages without a GPU: the interpreter runs the kernels, small."""
    os.environ["TRITON_INTERPRET"] = "1"
    small = ["tests/kernels/interpret/test_mix.py", GPU_TESTS, "-k", "out_of_range or gpu"]
    return {
        **plan(results),
        "device-tests": Stage(110, suite(*small)),
        "tune": Stage(240, module("benchmarks.tools.tune", "--small")),
    }


def main() -> None:
    names = list(plan(Path()))
    parser = argparse.ArgumentParser(prog="benchmarks.tools.gpu_check", description=__doc__)
    parser.add_argument("results", type=Path, help="folder for the results, created if missing")
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
    if options.only:
        names = [options.only]
    elif not options.dry_run:
        names.remove("tune")  # it alone takes minutes
    done = run({name: stages[name] for name in names}, results)
    sys.exit(not all(stage.passed for stage in done))


def run(stages: dict[str, Stage], results: Path, limit: float = LIMIT) -> list[Done]:
    """Every stage in turn, whether or not the one before passed, until the time is up.

    A stage may also use what those before it have left over.
    """
    done: list[Done] = []
    log = results / "stages.log"
    log.unlink(missing_ok=True)
    (results / measure.GOALS).unlink(missing_ok=True)
    end = time.perf_counter() + limit
    spare = 0.0
    for name, stage in stages.items():
        with log.open("a") as out:
            out.write(f"\n==== {name} ====\n")
        start = time.perf_counter()
        left = end - start
        passed, line = False, "cut: time was up"
        if left > 0:
            passed, line = stage.run(log, min(stage.seconds + spare, left))
        done.append(Done(name, passed, time.perf_counter() - start, line))
        spare += stage.seconds - done[-1].seconds
        print(
            f"{name}: {'pass' if passed else 'FAIL'}, {done[-1].seconds:.0f} s: {line}", flush=True
        )
        write_summary(results, done)
    return done


def write_summary(results: Path, done: list[Done]) -> None:
    """summary.md: the goals and whether they were reached, the machine, the stages so far."""
    import torch

    from fastmp.report.environment import environment

    goals = results / measure.GOALS
    reached = goals.read_text() if goals.exists() else "The goals were not measured.\n"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = "\n".join(f"- {key}: {value}" for key, value in environment(device).items())
    table = "\n".join(
        f"| {s.name} | {'pass' if s.passed else '**fail**'} | {s.seconds:.0f} | {s.line} |"
        for s in done
    )
    (results / "summary.md").write_text(
        f"# gpu-check\n\n{reached}\n{facts}\n\n"
        f"| stage | | seconds | |\n| --- | --- | --- | --- |\n{table}\n"
    )


if __name__ == "__main__":
    main()
