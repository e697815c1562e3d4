"""GFLOP/s of multiply-adds in registers: the bound of a product."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

ROUNDS = 10_000_000  # of 24 multiply-adds: about 70 ms
TRIES = 5


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.peak_run.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_float]
    library.peak_run.restype = ctypes.c_double
    library.peak_operations.restype = ctypes.c_int64
    return library


@cache
def peak(dtype: torch.dtype) -> float:
    """The best of five tries with torch's number of threads; fp16 is computed in fp32.

    0 without a compiler, or where the CPU has no instruction for the dtype.
    """
    library = _library()
    bf16 = dtype == torch.bfloat16
    if library is None or not library.peak_operations(bf16):
        return 0.0
    threads = torch.get_num_threads()
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIES):
            start = time.perf_counter()
            list(pool.map(lambda _: library.peak_run(bf16, ROUNDS, 0.5), range(threads)))
            elapsed = time.perf_counter() - start
            operations = threads * ROUNDS * int(library.peak_operations(bf16))
            best = max(best, operations / elapsed / 1e9)
    return best
