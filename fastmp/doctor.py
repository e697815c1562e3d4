"""The installation, the backend of each operation, and how to fix what is missing.

    for finding in doctor.examine(): print(finding)

The checks change nothing: no folder is created and no kernel is compiled.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import fastmp
from fastmp import backends, files
from fastmp.backends import cpu, cuda, triton

PACKAGES = ("torch", "numpy", "triton", "cuda-bindings", "tensorboard", "datasets", "pillow")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Finding:
    """One check: ``problem`` is what does not work, ``fix`` the command that repairs it.

    Both are None where nothing is wrong.
    """

    topic: str
    name: str
    found: str
    problem: str | None = None
    fix: str | None = None


def examine() -> list[Finding]:
    """All findings, by topic."""
    return [*_versions(), *_devices(), *_operations(), *_tools(), *_folders()]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "fastmp", fastmp.__version__)
    yield Finding("versions", "python", f"{platform.python_version()}, {sys.executable}")
    fixes = {
        "tensorboard": ("no TensorBoard events", "pip install tensorboard"),
        "datasets": ("no --data hf:NAME", "pip install 'fastmp[data]'"),
        "pillow": ("no --data FOLDER", "pip install 'fastmp[data]'"),
    }
    if torch.version.cuda is not None:
        fixes["triton"] = ("loss, linear and mixup run in plain PyTorch", "pip install triton")
        fixes["cuda-bindings"] = (
            "the optimizer step runs in plain PyTorch",
            "pip install cuda-bindings nvidia-cuda-nvrtc",
        )
    for name in PACKAGES:
        try:
            yield Finding("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            problem, fix = fixes.get(name, (None, None))
            yield Finding("versions", name, "not installed", problem, fix)


def _devices() -> Iterator[Finding]:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("devices", "cpu", f"{platform.machine()}, {threads}; {cpu.load()[1]}")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        problem = "the kernels need compute capability 8.0; plain PyTorch runs instead"
        yield Finding(
            "devices", str(device), found, problem if triton.supports_device(device) else None
        )
    if torch.cuda.is_available():
        return
    if not Path("/proc/driver/nvidia").exists():
        yield Finding("devices", "cuda", "none")
        return
    found = "an NVIDIA driver, but no GPU that PyTorch can use"
    fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    if torch.version.cuda is not None:
        fix = "nvidia-smi"
    yield Finding("devices", "cuda", found, "everything runs on the CPU", fix)


def _operations() -> Iterator[Finding]:
    """The backend of each operation, with the reason where it is plain PyTorch."""
    for row in backends.report():
        if row.device == "cuda" and not torch.cuda.is_available():
            continue
        problem = fix = None
        if row.backend == "reference":
            problem, fix = "runs in plain PyTorch", _fix(row.device, row.reason)
        name, found = f"{row.op} on {row.device}", f"{row.backend}: {row.reason}"
        yield Finding("operations", name, found, problem, fix)


def _fix(device: str, reason: str) -> str | None:
    if device == "cpu":
        return "FASTMP_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps fastmp"
    _, _, advice = reason.partition("pip install ")
    return f"pip install {advice}" if advice else None


def _tools() -> Iterator[Finding]:
    named = os.environ.get("CXX")
    names = (named,) if named else COMPILERS
    path = next(filter(None, map(shutil.which, names)), None)
    problem = fix = None
    if cpu.load()[0] is None and path is None:
        problem = "the native library cannot be built here"
        fix = "apt install g++    # or your system's compiler; then install fastmp again"
    yield Finding("tools", "C++ compiler", path or f"none of {', '.join(names)}", problem, fix)
    yield _nvrtc()


def _nvrtc() -> Finding:
    if not cuda.has_bindings():
        return Finding("tools", "NVRTC", "not checked: cuda-bindings is not installed")
    from fastmp.backends.cuda import nvrtc

    try:
        return Finding("tools", "NVRTC", ".".join(map(str, nvrtc.version())))
    except RuntimeError as error:
        problem = fix = None
        if cuda.load()[0]:
            problem = "the optimizer step runs in plain PyTorch"
            fix = "pip install nvidia-cuda-nvrtc"
        return Finding("tools", "NVRTC", str(error).partition(";")[0], problem, fix)


def _folders() -> Iterator[Finding]:

    triton_folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    kinds = (
        ("compiled CUDA kernels", files.cache_dir(), "FASTMP_CACHE"),
        ("compiled Triton kernels", triton_folder, "TRITON_CACHE_DIR"),
    )
    for name, folder, variable in kinds:
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        found = (
            f"{folder}, {size / 2**20:.1f} MiB" if folder.exists() else f"{folder}, not there yet"
        )
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        problem = fix = None
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            problem = f"{nearest} cannot be written: kernels are compiled every time"
            fix = f"export {variable}=/a/folder/of/yours"
        yield Finding("folders", name, found, problem, fix)
