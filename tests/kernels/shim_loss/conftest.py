"""The CUDA loss kernel on the CPU: its source compiled as C++, behind the code that launches it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fastmp.backends import registry
from fastmp.backends.abi import RingArgs
from fastmp.backends.cuda import launch, loss, nvrtc

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-pthread", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
# Sixteen consumers; a ring that holds one row and a little of the next.
ONE_BLOCK = loss.RingSize(1 << 30, threads=16, cluster=1, blocks=1, each=2)
TWO_BLOCKS = ONE_BLOCK._replace(cluster=2, each=1)


def build(source, target, *flags):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not there to compile the kernel with")
    include = f"-I{nvrtc.source_folder()}"
    command = [compiler, *FLAGS, *flags, include, str(HERE / source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("shim") / "libloss.so"
    library = ctypes.CDLL(str(build("kernels.cpp", target, "-fPIC", "-shared")))
    library.shim_loss.argtypes = [
        ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(RingArgs), ctypes.c_int64,
    ]  # fmt: skip
    library.shim_loss.restype = ctypes.c_bool
    return library


def ring(size, row_bytes, spare=3):
    """A ring for rows of so many bytes, with so many chunks more than one row takes."""
    vectors = -(-row_bytes // (loss.VECTOR_BYTES * size.cluster))
    slots = max(1, -(-vectors // (size.threads * size.each))) + spare
    chunk = loss.VECTOR_BYTES * size.threads * size.each
    return loss.Ring(size, slots, slots * (chunk + loss.SLOT_BYTES))


class Function:
    """In place of ``launch.Function``."""

    launches: ClassVar[list[str]] = []

    def __init__(self, library, name):
        self._library, self._name = library, name

    def launch(self, blocks, threads, args, shared=0, early=False):
        Function.launches.append(self._name)
        assert self._library.shim_loss(self._name.encode(), blocks, ctypes.byref(args), shared)


@pytest.fixture(autouse=True)
def kernels(library, monkeypatch):
    """Launches go to the C++ library; new memory is full of NaN, or 77; two multiprocessors."""
    monkeypatch.setattr(launch, "function", lambda file, name, *_: Function(library, name))
    monkeypatch.setattr(loss, "_num_sms", lambda device: 2)
    monkeypatch.setattr(loss, "DIVISOR_PARTS", 2)
    monkeypatch.setattr(loss, "SUM_THREADS", 20)
    monkeypatch.setattr(Function, "launches", [])
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(params=[ONE_BLOCK, TWO_BLOCKS], ids=["a block a row", "two blocks a row"])
def served(request, monkeypatch):
    """``fastmp.functional.cross_entropy`` calls the kernel, for rows of any length."""
    monkeypatch.setattr(loss, "sm_shared", lambda device: 1 << 30)
    monkeypatch.setattr(loss, "ring_for", lambda row_bytes, shared: ring(request.param, row_bytes))
    monkeypatch.setattr(loss, "CLASSES_IN_REGISTERS", 0)
    general = registry._kernels["loss_forward", "cpu"]
    narrow = registry._Kernel("shim", loss.forward, loss.supports, "")
    with torch.library._scoped_library("fastmp", "IMPL") as library:
        serve = registry.serve("loss_forward", general.call, general.supports, narrow)
        library.impl("loss_forward", serve, "CPU", allow_override=True)
        yield request.param
    assert Function.launches
