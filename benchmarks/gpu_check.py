"""``make gpu-check RESULTS=dir``: everything on one GPU, offline, in under ten minutes.

Uses the native library or builds it, runs the tests on the device and then the rest of the suite,
and measures what the kernels are asked to reach. A stage that fails does not stop the next one;
what each said lies in <stage>.log, the verdict in summary.md, the figures in gpu.md and gpu.json.
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
LIBRARY = ROOT / "fastmp" / "libfastmp_cpu.so"


class Stage(NamedTuple):
    """One stage and what became of it."""

    name: str
    passed: bool
    seconds: float
    words: str


def command(arguments: list[str], log: Path, seconds: float) -> tuple[bool, str]:
    """Run it with its output in a file; whether it succeeded, and its last line."""
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
    lines = log.read_text(errors="replace").split("\n")
    return code == 0, next((line.strip() for line in reversed(lines) if line.strip()), "")


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
    arguments = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *paths]
    return lambda log: command(arguments + parallel, log, seconds)


def benchmarks(results: Path, seconds: float) -> Callable[[Path], tuple[bool, str]]:
    arguments = [sys.executable, "-m", "benchmarks.gpu_check", "--measure", str(results)]
    return lambda log: command(arguments, log, seconds)


def measure(results: Path) -> bool:
    """Every case of benchmarks/gpu.py, each written as soon as it is there. Whether all passed."""
    from benchmarks import gpu, harness

    copy = harness.copy_bandwidth(500_000_000, "cuda", harness.DeviceTime())
    rows: list[harness.Row] = []
    failed: list[str] = []
    verdicts: list[tuple[str, str]] = []
    for name, case in gpu.cases():
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
        lines = [f"| {verdict} | {case} |" for verdict, case in verdicts]
        (results / "verdicts.md").write_text("\n".join(["| | case |", "| --- | --- |", *lines]))
    passed = sum(verdict == "pass" for verdict, _ in verdicts)
    print(f"{passed} of {len(verdicts)} passed, of {len(gpu.cases())} cases and a mean")
    return bool(verdicts) and passed == len(verdicts)


def _verdict(reached: bool) -> str:
    return "pass" if reached else "**fail**"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("results", type=Path, help="where the results go; made if need be")
    parser.add_argument("--measure", action="store_true", help="the last stage alone")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs an NVIDIA GPU that torch can see; `make test` needs none")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    if options.measure:
        sys.exit(not measure(results))
    device = [
        "tests/test_gpu.py",
        "tests/test_gpu_update.py",
        "tests/test_gpu_trainer.py",
        "tests/interpret",
    ]
    rest = ["tests", *(f"--ignore={path}" for path in device)]
    plan = [
        ("library", library),
        ("device-tests", tests(device, 200)),
        ("benchmarks", benchmarks(results, 220)),
        ("other-tests", tests(rest, 140)),
    ]
    stages = run(plan, results)
    sys.exit(not all(stage.passed for stage in stages))


def run(plan: list[tuple[str, Callable[[Path], tuple[bool, str]]]], results: Path) -> list[Stage]:
    """Every stage in turn, whatever became of the one before."""
    stages: list[Stage] = []
    for name, stage in plan:
        log = results / f"{name}.log"
        log.unlink(missing_ok=True)
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
