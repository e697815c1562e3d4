"""The native CPU library ``libfastmp_cpu``, through ctypes.

The structs mirror ``csrc/fastmp.h``. Only memory addresses cross this boundary: the operations in
``fastmp.ops`` check every argument before they come here.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import sys
import warnings
from ctypes import POINTER, Structure, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastmp import backends
from fastmp.backends.abi import DTYPE_CODES, Request

ABI_VERSION = 2

OK, BAD_ARGUMENT, NO_MEMORY, BAD_TARGET = range(4)


class UpdateArgs(Structure):
    """``fastmp_update_args``."""

    _fields_ = (
        ("size", c_int64),
        ("rows", c_void_p),
        ("row_count", c_int64),
        ("groups", c_void_p),
        ("group_count", c_int64),
        ("request", Request),
    )


class LossArgs(Structure):
    """``fastmp_loss_args``."""

    _fields_ = (
        ("size", c_int64),
        ("logits", c_void_p),
        ("dtype", c_int32),
        ("reduction", c_int32),
        ("rows", c_int64),
        ("classes", c_int64),
        ("row_stride", c_int64),
        ("target_a", c_void_p),
        ("target_b", c_void_p),
        ("lam", c_void_p),
        ("lam_stride", c_int64),
        ("weight", c_void_p),
        ("ignore_index", c_int64),
        ("smoothing", c_double),
        ("grad_output", c_void_p),
        ("grad_stride", c_int64),
        ("loss", c_void_p),
        ("stats", c_void_p),
        ("grad", c_void_p),
        ("bad_row", c_int64),
        ("bad_target", c_int64),
    )


class MixArgs(Structure):
    """``fastmp_mix_args``."""

    _fields_ = (
        ("size", c_int64),
        ("input", c_void_p),
        ("output", c_void_p),
        ("input_dtype", c_int32),
        ("output_dtype", c_int32),
        ("batch", c_int64),
        ("channels", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("index", c_void_p),
        ("lam", c_void_p),
        ("lam_stride", c_int64),
        ("box", c_void_p),
        ("box_stride", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
    )


class GemmArgs(Structure):
    """``fastmp_gemm_args``."""

    _fields_ = (
        ("size", c_int64),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("a_k_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("b_k_stride", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("depth", c_int64),
        ("dtype", c_int32),
        ("activation", c_int32),
        ("bias", c_void_p),
        ("preactivation", c_void_p),
        ("out", c_void_p),
        ("threads", c_int64),
    )


class ActivationArgs(Structure):
    """``fastmp_activation_args``."""

    _fields_ = (
        ("size", c_int64),
        ("saved", c_void_p),
        ("grad_output", c_void_p),
        ("out", c_void_p),
        ("grad_bias", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
        ("activation", c_int32),
    )


_ENTRY_POINTS = {
    "fastmp_update": UpdateArgs,
    "fastmp_loss_forward": LossArgs,
    "fastmp_loss_backward": LossArgs,
    "fastmp_mix": MixArgs,
    "fastmp_gemm": GemmArgs,
    "fastmp_activation": ActivationArgs,
    "fastmp_activation_backward": ActivationArgs,
}


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
    for name, args in _ENTRY_POINTS.items():
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
    return library is not None and bool(library.fastmp_multiplies(DTYPE_CODES[dtype]))


def call(name: str, args: Any) -> int:
    """Call an entry point with its struct and return BAD_TARGET or OK; raise on anything else."""
    library, reason = load()
    if library is None:
        raise RuntimeError(f"{name} needs the native library: {reason}")
    args.size = ctypes.sizeof(args)
    status = int(getattr(library, name)(ctypes.byref(args)))
    if status == NO_MEMORY:
        raise MemoryError(f"{name}: scratch memory could not be allocated")
    if status == BAD_ARGUMENT:
        raise RuntimeError(f"{name} refused its arguments: a defect in fastmp, please report it")
    return status
