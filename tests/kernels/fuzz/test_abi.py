"""The C ABI fuzzed under AddressSanitizer and UBSan; ``make sanitize`` tries ten times as much."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FLAGS = [
    "-std=c++17", "-g", "-O1", "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti",
    "-DFASTMP_TARGET=base",
]  # fmt: skip


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: nothing to build the fuzzer with")
    program = tmp_path_factory.mktemp("fuzz") / "abi"
    sources = [
        ROOT / "tests" / "kernels" / "fuzz" / "abi.cpp",
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
    ]
    command = [compiler, *FLAGS, "-o", str(program), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find -lasan" in done.stderr or "libasan" in done.stderr:
        pytest.skip("g++ comes without AddressSanitizer here")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("seed", [2, 3])
def test_every_input_gets_a_status(fuzzer, seed):
    done = subprocess.run([fuzzer, "10000", str(seed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ok, bad, _, targets = (int(part.split()[0]) for part in done.stdout.split(": ")[1].split(", "))
    assert min(ok, bad, targets) > 300  # the fuzzer reaches the kernels as well as the checks
