"""The native CPU library ``libfastmp_cpu``, through ctypes.

Only memory addresses cross this boundary, in the structs of ``structs.py``: the operations in
``fastmp.ops`` check every argument before it is called.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import sys
from ctypes import POINTER, Structure, c_void_p
from functools import cache
from pathlib import Path

import torch

from fastmp.backends import registry
from fastmp.backends.cpu.structs import ABI_VERSION, ENTRY_POINTS, Status


def _library_path() -> Path:
    # files(), not __file__: in an editable install the library lies in another folder.
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    return Path(str(importlib.resources.files("fastmp") / f"libfastmp_cpu{suffix}"))


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.fastmp_abi_version()
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this Python code needs {ABI_VERSION}")
    library.fastmp_target.restype = ctypes.c_char_p
    for name, args in ENTRY_POINTS.items():
        getattr(library, name).argtypes = [POINTER(args)]
    return library


def torch_library() -> ctypes.CDLL | None:
    """torch's own library, which exports its stable C ABI."""
    name = {"darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None


def use_torch_thread_pool(library: ctypes.CDLL) -> str:
    """Give the library torch's own threads: a second OpenMP runtime would be a second pool."""
    pool = getattr(torch_library(), "torch_parallel_for", None)
    if pool is None:
        return "one thread: this torch exports no torch_parallel_for"
    library.fastmp_set_parallel_for.argtypes = [c_void_p]
    library.fastmp_set_parallel_for(ctypes.cast(pool, c_void_p))
    return "torch's threads"


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and the reason. Warns once if there is none.

    Raises:
        RuntimeError: there is none and ``FASTMP_BACKEND`` demands it.
    """
    path = _library_path()
    try:
        library = _open(path)
    except (OSError, AttributeError) as error:
        reason = f"no usable native library: {error}"
        fix = "With a C++17 compiler (Debian: apt install g++) reinstall fastmp: pip install ."
        registry.mark_unavailable("cpu", reason, fix=fix)
        return None, reason
    threads = use_torch_thread_pool(library)
    reason = f"libfastmp_cpu, instruction set {instruction_set(library)}, {threads}"
    registry.mark_available("cpu", reason)
    return library, reason


def instruction_set(library: ctypes.CDLL | None) -> str:
    """Of the kernels: base, v3, v4 or v4bf16; "reference" without a library."""
    return "reference" if library is None else library.fastmp_target().decode()


def load_holding_gil() -> ctypes.PyDLL | None:
    """The library for calls that read Python's objects; None if there is none."""
    return None if load()[0] is None else ctypes.PyDLL(str(_library_path()))


def call(name: str, args: Structure) -> int:
    """Call an entry point with its struct and return BAD_TARGET or OK; raise on anything else."""
    library, reason = load()
    if library is None:
        raise RuntimeError(f"{name} needs the native library: {reason}")
    args.size = ctypes.sizeof(args)
    status = int(getattr(library, name)(ctypes.byref(args)))
    if status == Status.NO_MEMORY:
        raise MemoryError(f"{name}: scratch memory could not be allocated")
    if status == Status.BAD_ARGUMENT:
        raise RuntimeError(f"{name} refused its arguments: a defect in fastmp, please report it")
    return status


load()
