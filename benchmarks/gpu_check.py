"""``make gpu-check RESULTS=dir``: everything on one GPU, offline, in under ten minutes.

Uses the native library or builds it, runs the tests on the device, measures what the kernels are
asked to reach, looks for races and stray accesses and runs the rest of the suite. A stage that
fails does not stop the next one. All that was said lies in stages.log, the verdict in summary.md,
the figures in gpu.md, gpu.json and gpu.png. ``--only tune`` tries other tiles. ``--dry-run`` goes
through every stage without a GPU, small, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
LIBRARY = ROOT / "fastmp" / "libfastmp_cpu.so"


class Stage(NamedTuple):
    """One stage and what became of it."""

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


def library(log: Path) -> tuple[bool, str]:
    """The installed library if it loads, else one built with CMake next to the package."""
    probe = [sys.executable, "-c", "import sys; from fastmp.backends import cpu; "
             "library, reason = cpu.load(); print(reason); sys.exit(library is None)"]  # fmt: skip
    found, words = command(probe, log, 60)
    if found:
        return found, words
    build = ROOT / "build" / "gpu-check"
    for arguments in (
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(build), "--parallel"],
    ):
        done, words = command(arguments, log, 120)
        if not done:
            return False, words
    shutil.copy(build / LIBRARY.name, LIBRARY)
    return command(probe, log, 60)


def tests(paths: list[str], seconds: float) -> Callable[[Path], tuple[bool, str]]:
    """pytest on these paths; where pytest-xdist is there, in several processes that compile."""
    processes = str(min(os.cpu_count() or 1, 12))
    parallel = ["-n", processes] if importlib.util.find_spec("xdist") else []
    arguments = [*PYTEST, "-rs", *paths]
    return lambda log: command(arguments + parallel, log, seconds)


def module(seconds: float, *arguments: str) -> Callable[[Path], tuple[bool, str]]:
    """python -m with these arguments."""
    return lambda log: command([sys.executable, "-m", *arguments], log, seconds)


def sanitizer(paths: list[str], seconds: float) -> Callable[[Path], tuple[bool, str]]:
    """NVIDIA's memcheck and racecheck on a few tests: each slows a kernel down a hundred times."""

    def stage(log: Path) -> tuple[bool, str]:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return True, "cut: compute-sanitizer is not installed"
        for kind in ("memcheck", "racecheck"):
            arguments = [tool, "--tool", kind, "--error-exitcode", "1", *PYTEST, *paths]
            done, words = command(arguments, log, seconds / 2)
            if not done:
                return False, f"{kind}: {words}"
        return True, "memcheck and racecheck found nothing"

    return stage


def measure(results: Path) -> bool:
    """Every case of benchmarks/gpu.py, each written as soon as it is there. Whether all passed."""
    from benchmarks import gpu, harness

    copy = harness.copy_bandwidth(500_000_000, "cuda", harness.DeviceTime())
    rows: list[harness.Row] = []
    failed: list[str] = []
    verdicts: list[tuple[str, str]] = []
    for number, (name, case) in enumerate(gpu.cases(), 1):
        start = time.perf_counter()
        try:
            rows.append(case())
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        if not rows:
            continue
        harness.write("gpu", rows, copy, results, "cuda")
        mean, ratio, goal = gpu.plain_mean(rows)
        verdicts = [(_verdict(row.reached(copy)), row.case) for row in rows]
        verdicts += [(_verdict(ratio >= goal), f"{mean}: {ratio:.3f}x, {goal}x asked")]
        verdicts += [("**error**", name) for name in failed]
        verdicts += [("not reached", name) for name, _ in gpu.cases()[number:]]
        lines = [f"| {verdict} | {case} |" for verdict, case in verdicts]
        (results / "verdicts.md").write_text("\n".join(["| | case |", "| --- | --- |", *lines]))
    passed = sum(verdict == "pass" for verdict, _ in verdicts)
    print(f"{passed} of {len(verdicts)} passed, of {len(gpu.cases())} cases and a mean")
    return bool(verdicts) and passed == len(verdicts)


def _verdict(reached: bool) -> str:
    return "pass" if reached else "**fail**"


DEVICE_TESTS = ["tests/test_gpu.py", "tests/test_gpu_update.py", "tests/test_gpu_trainer.py"]
SANITIZED = ["tests/test_gpu.py", "-k", "three_runs"]  # every kernel, a few times


def plan(results: Path) -> dict[str, Callable[[Path], tuple[bool, str]]]:
    """The stages on a GPU, with the seconds that each may take: 590 in all, without the last."""
    device = [*DEVICE_TESTS, "tests/interpret"]
    rest = ["tests", *(f"--ignore={path}" for path in device)]
    return {
        "library": library,
        "device-tests": tests(device, 200),
        "benchmarks": module(200, "benchmarks.gpu_check", "--measure", str(results)),
        "sanitizer": sanitizer(SANITIZED, 60),
        "other-tests": tests(rest, 130),
        "tune": module(240, "benchmarks.tune", "--seconds", "200"),
    }


def dry_plan() -> dict[str, Callable[[Path], tuple[bool, str]]]:
    """The same stages where there is no GPU: the interpreter runs the kernels, small."""
    os.environ["TRITON_INTERPRET"] = "1"
    return {
        "library": library,
        "device-tests": tests(
            ["tests/interpret/test_mix.py", *DEVICE_TESTS, "-k", "out_of_range or gpu"], 200
        ),
        "benchmarks": module(200, "benchmarks", "--quick", "loss"),
        "sanitizer": sanitizer(SANITIZED, 60),
        "other-tests": tests(["tests/test_backends.py"], 130),
        "tune": module(240, "benchmarks.tune", "--small"),
    }


def main() -> None:
    names = list(plan(Path()))
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("results", type=Path, help="where the results go; made if need be")
    parser.add_argument("--only", choices=names, help="this stage alone")
    parser.add_argument("--dry-run", action="store_true", help="every stage, without a GPU")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        sys.exit(
            "gpu-check needs an NVIDIA GPU that torch can see; --dry-run (make gpu-check "
            "ARGS=--dry-run) goes through its stages without one, `make test` needs none"
        )
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if options.measure:
        sys.exit(not measure(results))
    stages = dry_plan() if options.dry_run else plan(results)
    # tuning is for when somebody asks: it alone takes minutes
    chosen = (
        [options.only] if options.only else [n for n in names if n != "tune" or options.dry_run]
    )
    done = run([(name, stages[name]) for name in chosen], results)
    sys.exit(not all(stage.passed for stage in done))


def run(plan: list[tuple[str, Callable[[Path], tuple[bool, str]]]], results: Path) -> list[Stage]:
    """Every stage in turn, whatever became of the one before."""
    stages: list[Stage] = []
    log = results / "stages.log"
    log.unlink(missing_ok=True)
    for name, stage in plan:
        with log.open("a") as out:
            out.write(f"\n==== {name} ====\n")
        start = time.perf_counter()
        passed, words = stage(log)
        stages.append(Stage(name, passed, time.perf_counter() - start, words))
        verdict = "pass" if passed else "FAIL"
        print(f"{name}: {verdict}, {stages[-1].seconds:.0f} s: {words}", flush=True)
        write_summary(results, stages)
    return stages


def write_summary(results: Path, stages: list[Stage]) -> None:
    """summary.md: the machine, the stages so far, the verdict on each case."""
    import torch

    from benchmarks.harness import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = "\n".join(f"- {key}: {value}" for key, value in environment(device).items())
    table = "\n".join(
        f"| {s.name} | {'pass' if s.passed else '**fail**'} | {s.seconds:.0f} | {s.words} |"
        for s in stages
    )
    verdicts = results / "verdicts.md"
    text = (
        f"# gpu-check\n\n{facts}\n\n| stage | | seconds | |\n| --- | --- | --- | --- |\n{table}\n"
    )
    text += "\n" + verdicts.read_text() + "\n" if verdicts.exists() else ""
    (results / "summary.md").write_text(text)


if __name__ == "__main__":
    main()
