"""The native CPU library ``libfastmp_cpu``, through ctypes.

Only memory addresses cross this boundary, in the structs of ``structs.py``: the operations in
``fastmp.ops`` check every argument before they come here.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import sys
import warnings
from ctypes import POINTER, Structure, c_void_p
from functools import cache
from pathlib import Path

import torch

from fastmp import backends
from fastmp.backends.abi import DTYPE_CODES
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


def _hand_over_thread_pool(library: ctypes.CDLL) -> str:
    """Give the library torch's own threads: a second OpenMP runtime would be a second pool."""
    name = {"darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        pool = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return "one thread: this torch exports no torch_parallel_for"
    library.fastmp_set_parallel_for.argtypes = [c_void_p]
    library.fastmp_set_parallel_for(ctypes.cast(pool, c_void_p))
    return "torch's threads"


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and the reason in words. Warns once if there is none.

    Raises:
        RuntimeError: there is none and ``FASTMP_BACKEND`` demands it.
    """
    path = _library_path()
    try:
        library = _open(path)
    except (OSError, AttributeError) as error:
        reason = f"no usable native library: {error}"
        if backends.required() == "cpu":
            raise RuntimeError(f"FASTMP_BACKEND=cpu, but there is {reason}") from error
        warnings.warn(
            f"fastmp runs on its slow reference backend ({reason}). "
            "Install a C++17 compiler (Debian: apt install g++) and reinstall fastmp.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason
    threads = _hand_over_thread_pool(library)
    return library, f"libfastmp_cpu, instruction set {library.fastmp_target().decode()}, {threads}"


def serves(op: str, detail: str = "") -> bool:
    """Whether the library is there to carry out ``op``; notes the answer in the report."""
    library, reason = load()
    if library is None:
        backends.record(op, "cpu", "reference", reason)
    else:
        backends.record(op, "cpu", "cpu", f"{reason}; {detail}" if detail else reason)
    return library is not None


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the library's matrix product is the fastest known one for ``dtype`` on this CPU."""
    library, _ = load()
    return library is not None and bool(library.fastmp_prefers_own_gemm(DTYPE_CODES[dtype]))


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
