"""NVRTC: compilation, the cache, architectures, the reasons in the report."""

import ctypes
import hashlib
import os
import subprocess
import sys

import pytest
import torch

from fastmp import backends
from fastmp.backends import cuda, registry
from fastmp.backends.abi import StepArgs

pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed: no NVRTC")

from fastmp.backends.cuda import launch, nvrtc
from fastmp.backends.cuda.update import case_of

NAME = launch.kernel_name((case_of(2, 0, 0, 0),))
BUILD = ("cuda/update.cu", NAME, "sm_90")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """How often the compiler ran."""
    calls = []
    compile = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda *a: (calls.append(a), compile(*a))[1])
    return calls


def test_a_kernel_is_compiled_once(folder, compiled):
    first, second = nvrtc.build(*BUILD), nvrtc.build(*BUILD)
    assert first == second
    assert first.code[:4] == b"\x7fELF"
    assert first.kernel in first.code.decode("latin1")
    assert len(compiled) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]  # nothing half-written
    nvrtc.build(*BUILD[:2], "sm_80")
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "renamed", "not ours"])
def test_a_broken_or_foreign_entry_is_compiled_again(folder, compiled, damage, monkeypatch):
    first = nvrtc.build(*BUILD)
    (entry,) = folder.iterdir()
    data = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(data[:-1])
    elif damage == "flipped":
        entry.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "renamed":
        nvrtc.build(*BUILD[:2], "sm_80")
        (other,) = set(folder.iterdir()) - {entry}
        other.replace(entry)
        compiled.clear()
        compiled.append("the first")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    again = nvrtc.build(*BUILD)
    assert again.kernel == first.kernel
    assert again.code[:4] == b"\x7fELF"
    assert len(compiled) == 2
    if damage != "not ours":
        assert nvrtc.build(*BUILD) == again
        assert len(compiled) == 2


def test_another_source_or_version_is_another_entry(monkeypatch):
    entry = nvrtc._entry(*BUILD)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "version", lambda: (99, 0))
        assert nvrtc._entry(*BUILD) != entry
    sources = nvrtc._sources()
    assert {"common/rules.h", "common/step.h", "common/table.h", "cuda/update.cu"} <= set(sources)
    monkeypatch.setattr(nvrtc, "_sources", lambda: {**sources, "common/rules.h": b""})
    assert nvrtc._entry(*BUILD) != entry


def test_a_cache_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="Set FASTMP_CACHE to a folder that can be written"):
        assert nvrtc.build(*BUILD).code


def test_an_error_in_the_source_comes_with_its_line():
    with pytest.raises(RuntimeError, match=r"could not compile cuda/update.cu:\n.*NoSuchRule"):
        nvrtc.compile("cuda/update.cu", "fastmp::update<fastmp::NoSuchRule>", "sm_90")


def test_architectures_that_nvrtc_does_not_know():
    assert nvrtc.target(90) == "sm_90"
    newer = nvrtc.target(999)
    assert newer.startswith("compute_")
    assert b".target sm_" in nvrtc.compile(*BUILD[:2], newer).code
    with pytest.raises(RuntimeError, match=r"compute capability 3\.5, NVRTC needs 7\.5"):
        nvrtc.target(35)


def test_unavailable_cuda_is_reported(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    load = cuda.load.__wrapped__
    assert load() == (False, "this PyTorch is built without CUDA")
    monkeypatch.setenv("FASTMP_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTMP_BACKEND=cuda, but this PyTorch is built"):
        load()


def test_a_gpu_that_nvrtc_cannot_serve_gets_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K40")
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.mark_available("cuda", "NVRTC")
    supports_device = cuda.supports_device.__wrapped__
    with pytest.warns(RuntimeWarning, match="Tesla K40: compute capability 3.5"):
        assert supports_device(torch.device("cuda", 0)).startswith("compute capability 3.5")
    (row,) = [row for row in backends.report() if (row.op, row.device) == ("update", "cuda")]
    assert row.backend == "reference"
    monkeypatch.setenv("FASTMP_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTMP_BACKEND=cuda, but Tesla K40"):
        supports_device(torch.device("cuda", 0))


FILL = """
import hashlib, sys, time
from pathlib import Path
from fastmp.backends.cuda import nvrtc
gate, file, kernel, architecture = sys.argv[1:]
nvrtc.version()
print("ready", flush=True)
while not Path(gate).exists():
    time.sleep(0.001)
image = nvrtc.build(file, kernel, architecture)
print(image.kernel, hashlib.sha256(image.code).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_fill_the_cache_at_once(folder, tmp_path, compiled):
    """Four, let off by one gate: each gets a kernel, one entry stays, whole, and nothing else.

    Which of them wrote it is open; NVRTC's own bytes differ from process to process.
    """
    gate = tmp_path / "gate"
    line = [sys.executable, "-c", FILL, str(gate), *BUILD]
    crowd = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for one in crowd:
        assert one.stdout.readline() == "ready\n"
    gate.touch()
    found = [one.communicate(timeout=120)[0].split() for one in crowd]
    assert [one.returncode for one in crowd] == [0] * 4
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    image = nvrtc.build(*BUILD)
    assert not compiled
    assert {kernel for kernel, _ in found} == {image.kernel}
    assert hashlib.sha256(image.code).hexdigest() in {digest for _, digest in found}


@pytest.mark.parametrize(
    ("driver", "compiler", "limit"),
    [
        (13000, (13, 0), 32764),
        (12010, (12, 1), 32764),
        (12000, (13, 0), 4096),
        (13000, (12, 0), 4096),
    ],
)
def test_an_argument_is_as_long_as_driver_and_compiler_take(monkeypatch, driver, compiler, limit):
    from cuda.bindings import driver as bindings

    success = bindings.CUresult.CUDA_SUCCESS
    monkeypatch.setattr(bindings, "cuDriverGetVersion", lambda: (success, driver))
    monkeypatch.setattr(nvrtc, "version", lambda: compiler)
    words = launch.words_in_argument()
    assert (words > 512) == (limit > 4096)
    assert ctypes.sizeof(StepArgs) + 8 * words <= limit
    name = launch.kernel_name((case_of(2, 0, 0, 0),), words)
    assert nvrtc.compile("cuda/update.cu", name, "sm_90").code[:4] == b"\x7fELF"
