"""What this installation is, what each operation runs on, and what to do for more.

    for finding in doctor.examine(): print(finding)

Nothing here changes anything: folders are looked at, not made, and no kernel is compiled.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import fastmp
from fastmp import backends
from fastmp.backends import cpu, cuda, triton

PACKAGES = ("torch", "numpy", "triton", "cuda-bindings", "tensorboard", "datasets", "pillow")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``cure`` is the command that mends it, None where all is well.

    ``problem`` says what is lost without the cure.
    """

    topic: str
    name: str
    found: str
    problem: str | None = None
    cure: str | None = None


def examine() -> list[Finding]:
    """All findings, by topic."""
    return [*_versions(), *_devices(), *_operations(), *_tools(), *_folders()]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "fastmp", fastmp.__version__)
    yield Finding("versions", "python", f"{platform.python_version()}, {sys.executable}")
    cures = {
        "tensorboard": ("no TensorBoard events", "pip install tensorboard"),
        "datasets": ("no --data hf:NAME", "pip install 'fastmp[data]'"),
        "pillow": ("no --data FOLDER", "pip install 'fastmp[data]'"),
    }
    if torch.version.cuda is not None:
        cures["triton"] = ("loss, linear and mixup run in plain PyTorch", "pip install triton")
        cures["cuda-bindings"] = (
            "the optimizer step runs in plain PyTorch",
            "pip install cuda-bindings nvidia-cuda-nvrtc",
        )
    for name in PACKAGES:
        try:
            yield Finding("versions", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            problem, cure = cures.get(name, (None, None))
            yield Finding("versions", name, "not installed", problem, cure)


def _devices() -> Iterator[Finding]:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield Finding("devices", "cpu", f"{platform.machine()}, {threads}; {cpu.load()[1]}")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", number)
        name, (major, minor) = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        old = not triton.runs_on(device)
        yield Finding(
            "devices",
            str(device),
            f"{name}, compute capability {major}.{minor}",
            "the kernels need compute capability 8.0; plain PyTorch runs instead" if old else None,
        )
    if torch.cuda.is_available():
        return
    if Path("/proc/driver/nvidia").exists():
        built = torch.version.cuda is not None
        yield Finding(
            "devices",
            "cuda",
            "an NVIDIA driver, but no GPU that PyTorch can use",
            "everything runs on the CPU",
            "nvidia-smi"
            if built
            else "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    else:
        yield Finding("devices", "cuda", "none")


def _operations() -> Iterator[Finding]:
    """Who serves each operation, and where it is plain PyTorch, why."""
    has_gpu = torch.cuda.is_available()
    for served in backends.report():
        if served.device == "cuda" and not has_gpu:
            continue
        slow = served.backend == "reference"
        yield Finding(
            "operations",
            f"{served.op} on {served.device}",
            f"{served.backend}: {served.reason}",
            "runs in plain PyTorch" if slow else None,
            _cure(served) if slow else None,
        )


def _cure(served: backends.Served) -> str | None:
    if served.device == "cpu":
        return "FASTMP_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps fastmp"
    _, _, advice = served.reason.partition("pip install ")
    return f"pip install {advice}" if advice else None


def _tools() -> Iterator[Finding]:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    missing = cpu.load()[0] is None and found is None
    yield Finding(
        "tools",
        "C++ compiler",
        found or f"none of {', '.join([named] if named else COMPILERS)}",
        "the native library cannot be built here" if missing else None,
        "apt install g++    # or your system's compiler; then install fastmp again"
        if missing
        else None,
    )
    yield _nvrtc()


def _nvrtc() -> Finding:
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        return Finding("tools", "NVRTC", "not looked for: cuda-bindings is not installed")
    from fastmp.backends.cuda import nvrtc

    try:
        return Finding("tools", "NVRTC", ".".join(map(str, nvrtc.version())))
    except RuntimeError as error:
        needed = cuda.load()[0]
        problem = "the optimizer step runs in plain PyTorch" if needed else None
        cure = "pip install nvidia-cuda-nvrtc" if needed else None
        return Finding("tools", "NVRTC", str(error).partition(";")[0], problem, cure)


def _folders() -> Iterator[Finding]:
    from fastmp.backends.cuda import nvrtc

    triton_folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    kinds = (
        ("compiled CUDA kernels", nvrtc.cache_folder(), "FASTMP_CACHE"),
        ("compiled Triton kernels", triton_folder, "TRITON_CACHE_DIR"),
    )
    for name, folder, variable in kinds:
        nearest = next(p for p in (folder, *folder.parents) if p.exists())
        writable = nearest.is_dir() and os.access(nearest, os.W_OK)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        yield Finding(
            "folders",
            name,
            f"{folder}, {size / 2**20:.1f} MiB" if folder.exists() else f"{folder}, not there yet",
            None if writable else f"{nearest} cannot be written: kernels are compiled every time",
            None if writable else f"export {variable}=/a/folder/of/yours",
        )
