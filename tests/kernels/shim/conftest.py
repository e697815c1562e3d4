"""The CUDA kernel on the CPU: its source compiled as C++, behind the code that launches it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmp.backends import cuda
from fastmp.backends.abi import Work
from fastmp.backends.cuda import launch, update
from fastmp.ops.update import step_table

SOURCE = Path(__file__).parent / "shim.cpp"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wall"]


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
    library.shim_update.argtypes = [ctypes.c_int32, ctypes.POINTER(Work)]
    library.shim_rule.restype = ctypes.c_char_p
    return library


class Kernel:
    """What ``driver.Kernel`` is on a GPU; counts what it is asked for."""

    most_blocks = 2
    capturing = False
    launches = uploads = 0

    def __init__(self, library):
        self._library = library

    def launch(self, blocks, work):
        Kernel.launches += 1
        self._library.shim_update(blocks, ctypes.byref(work))

    def is_capturing(self):
        return Kernel.capturing

    def host_memory(self, size):
        Kernel.uploads += 1
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source, target):
        target.copy_(source)


@pytest.fixture(autouse=True)
def kernel(library, monkeypatch):
    """Tensors on the CPU are taken for tensors on a GPU."""
    monkeypatch.setattr(step_table, "is_on_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(cuda, "load", lambda: (True, "the shim"))
    monkeypatch.setattr(cuda, "supports_device", lambda device: None)
    monkeypatch.setattr(launch, "kernel", lambda cases, device: Kernel(library))
    monkeypatch.setattr(update, "_SPANS", 5)  # 12 barriers each, of real threads
    monkeypatch.setattr(Kernel, "launches", 0)
    monkeypatch.setattr(Kernel, "uploads", 0)
    monkeypatch.setattr(Kernel, "most_blocks", 2)
    monkeypatch.setattr(Kernel, "capturing", False)
    return Kernel
