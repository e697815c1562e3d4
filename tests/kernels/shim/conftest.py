"""The CUDA kernel on the CPU: its source compiled as C++, behind the code that launches it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmp.backends import native_table, registry
from fastmp.backends.abi import StepArgs
from fastmp.backends.cuda import launch, nvrtc, update

SOURCE = Path(__file__).parent / "shim.cpp"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wall"]
FLAGS += [f"-DFASTMP_CHUNK_SIZE={nvrtc.CHUNK_SIZE}"]


def build(target, *flags):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not there to compile the kernel with")
    command = [compiler, *FLAGS, "-Wno-unknown-pragmas", *flags, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    library = build(tmp_path_factory.mktemp("shim") / "libshim.so")
    library.shim_update.argtypes = [ctypes.c_int32, ctypes.POINTER(StepArgs)]
    library.shim_has_rule.restype = ctypes.c_bool
    return library


class Kernel:
    """In place of ``launch.Kernel``; counts its calls."""

    max_blocks = 2
    words = 100
    capturing = False
    launches = uploads = 0

    def __init__(self, library):
        self._library = library

    def prepare(self, blocks, args):
        def launch():
            Kernel.launches += 1
            self._library.shim_update(blocks, ctypes.byref(args))

        return launch

    def is_capturing(self):
        return Kernel.capturing

    def host_memory(self, size):
        Kernel.uploads += 1
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source, target):
        target.copy_(source)


@pytest.fixture
def cpu_engine():
    """The kernel of the CPU library, as it was registered before the CUDA kernel replaces it."""
    return registry._kernels["update", "cpu"]


@pytest.fixture(autouse=True)
def kernel(cpu_engine, library, monkeypatch):
    """The CUDA kernel serves tensors in main memory."""
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    registry.mark_available("shim", "csrc/cuda/update.cu, compiled as C++")
    supports = native_table.supports
    registry.register("update", "cpu", update.CudaStepTable, backend="shim", supports=supports)
    monkeypatch.setattr(launch, "kernel", lambda cases, device: Kernel(library))
    monkeypatch.setattr(update, "MAX_PARTIALS", 5)  # 12 barriers each, of real threads
    monkeypatch.setattr(Kernel, "launches", 0)
    monkeypatch.setattr(Kernel, "uploads", 0)
    monkeypatch.setattr(Kernel, "max_blocks", 2)
    monkeypatch.setattr(Kernel, "capturing", False)
    return Kernel
