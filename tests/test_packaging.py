"""What is published: version, wheels, requirements, and the first screen of the README."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastmp

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---- the README ----


def test_the_readme_is_short_and_starts_with_code():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith(("```", "    ")))
    assert first <= 15
    assert len(lines) <= 160


def test_the_headline_picture_is_of_the_results_as_they_are():
    from benchmarks.tools import headline

    assert headline.PICTURE.read_text() == headline.svg(), "run python -m benchmarks.tools.headline"
    assert len(headline.HEADLINES) == 5
    assert all(headline.row_of(h)[0] > 1.5 for h in headline.HEADLINES)


def test_the_recording_is_of_fastmp_train():
    picture = (ROOT / "docs" / "terminal.svg").read_text()
    assert re.search(r">\$ fastmp train.*<", picture)
    assert "epoch" in picture


def test_a_recorded_terminal_shows_what_a_terminal_shows():
    from benchmarks.tools.terminal import Screen, svg

    screen = Screen()
    screen.write("one\r\n 10%", 1.0)
    screen.write("\r\x1b[K 100%\r\n", 2.0)
    screen.write("\x1b[Aabc\x1b[2A\rO", 3.0)
    assert screen.lines == [("One", 3.0), ("abc0%", 3.0), ("", 2.0)]
    assert svg("a", [("x" * 90, 1.0)]).count("<text") == 3  # wrapped at 80 columns


# ---- the package ----


def test_the_version_is_the_same_everywhere():
    assert PROJECT["tool"]["scikit-build"]["metadata"]["version"]["input"] == "fastmp/__init__.py"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changed = re.search(r"^## (\d\S*?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited[1] == changed[1] == fastmp.__version__


def test_what_is_built_needs_no_torch():
    """An isolated build would otherwise download it, unpinned."""
    assert [re.split(r"[<>=]", r)[0] for r in PROJECT["build-system"]["requires"]] == [
        "scikit-build-core"
    ]


def test_every_requirement_is_pinned():
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pinned = {line.split("==")[0] for line in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    names = {
        re.split(r"[\[<>=; ]", requirement)[0].lower().replace("_", "-")
        for extra in ("train", "data", "docs", "dev")
        for requirement in [*extras[extra], *PROJECT["project"]["dependencies"]]
    }
    assert names - pinned == {"fastmp"}


def test_wheels_are_built_for_both_processors():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    jobs = workflow["jobs"]
    built = jobs["wheel"]["strategy"]["matrix"]["include"]
    assert {row["arch"] for row in built} == {"x86_64", "aarch64"}
    uses = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.search(r"@v\d", used) for used in uses)
    assert any(used.startswith("pypa/cibuildwheel@") for used in uses)
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["environment"]["FASTMP_REQUIRE_NATIVE"] == "1"
    assert settings["build"].startswith("cp3")


def commands_of(target, tmp_path):
    make = shutil.which("make") or pytest.skip("make is not installed")
    command = [make, "-n", f"ENV={tmp_path / 'env'}", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_train_installs_what_training_needs_and_trains_in_16_bits(tmp_path):
    train, test = (commands_of(target, tmp_path) for target in ("train", "test"))
    assert "fastmp train --dtype bf16" in train
    assert "[dev]" not in train
    assert "[dev]" in test


# ---- aarch64 ----


def cross_compiler():
    if found := shutil.which("aarch64-linux-gnu-g++"):
        return [found]
    zig = [sys.executable, "-m", "ziglang"]
    if subprocess.run([*zig, "version"], capture_output=True, check=False).returncode == 0:
        return [*zig, "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.slow
def test_the_native_library_compiles_for_aarch64(tmp_path):
    """Its kernels without an instruction set of their own, which serve there."""
    compiler = cross_compiler()
    if compiler is None:
        pytest.skip("neither aarch64-linux-gnu-g++ nor the package ziglang is installed")
    library = tmp_path / "libfastmp_cpu.so"
    flags = ["-std=c++17", "-O0", "-DFASTMP_TARGET=base", "-fno-exceptions", "-fno-rtti", "-fPIC"]
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    command = [*compiler, *flags, "-Wall", "-Wextra", "-shared", "-o", library, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert library.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64
