"""Which matrix product a linear layer takes on this processor: the library's own, or torch's.

A table by what the processor can do, from these measurements on two threads (GFLOP/s, own : torch):

                                            fp32         bf16             fp16
    AMD Zen 4, AVX512-BF16 (2026-11)      210 : 150    420 : 390        210 : 30
    Intel Sapphire Rapids (2026-11)                        - : 690-1870  187-240 : 235-300

torch's product is MKL's in fp32, which keeps its fastest kernels for Intel, and oneDNN's in 16
bits: AMX on Intel, AVX512-FP16 where it is there; elsewhere its fp16 is 7 to 10 times slower. In
AVX2 fp32 was no faster than MKL. A processor that no row describes is measured at the first product
of a dtype, for about 50 ms, and the answer is kept in the cache folder.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fastmp import files
from fastmp.backends import cpu as native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILE = "gemm-choice.json"  # in the cache folder
_SIDE = 512  # of the matrices of a measurement: 2 ms at 130 GFLOP/s
_SECONDS = 0.05
_MARGIN = 1.05  # what the own product must gain: a call of the library fuses bias and activation


class Processor(NamedTuple):
    """Name, vendor ("AuthenticAMD"), and the kernel's names of what it can do; empty: unknown."""

    name: str
    vendor: str
    features: frozenset[str]


class _Row(NamedTuple):
    """A row of the table: who makes the processor ("": anyone), what it must and must not have."""

    vendor: str
    has: frozenset[str]
    lacks: frozenset[str]
    own: dict[torch.dtype, bool]


def _row(vendor: str, has: str, lacks: str, **own: bool) -> _Row:
    dtypes = {getattr(torch, name): value for name, value in own.items()}
    return _Row(vendor, frozenset(has.split()), frozenset(lacks.split()), dtypes)


# The first row that fits and names the dtype decides.
_TABLE = (
    _row("AuthenticAMD", "avx512_bf16", "", float32=True, bfloat16=True, float16=True),
    _row("GenuineIntel", "amx_bf16", "", float32=False, bfloat16=False),
    _row("GenuineIntel", "avx512_fp16", "", float16=False),
    _row("GenuineIntel", "avx512f", "", float32=False),
    _row("", "avx2", "avx512f", float32=False, bfloat16=False, float16=True),
)


@cache
def processor() -> Processor:
    """Of this machine; on other systems than Linux the name alone."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""

    def found(key: str) -> str:
        match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        return match[1].strip() if match else ""

    name = found("model name") or platform.processor() or platform.machine()
    return Processor(name, found("vendor_id"), frozenset(found("flags").split()))


def from_table(cpu: Processor, dtype: torch.dtype) -> bool | None:
    """Whether the own product is taken there; None: no row describes the processor."""
    for row in _TABLE:
        fits = row.vendor in ("", cpu.vendor) and row.has <= cpu.features
        if fits and not row.lacks & cpu.features and dtype in row.own:
            return row.own[dtype]
    return None


@cache
def prefers_own(dtype: torch.dtype) -> bool:
    """Whether the library's product is the faster one for ``dtype`` on this machine."""
    known = from_table(processor(), dtype)
    return known if known is not None else _remembered(dtype)


def _remembered(dtype: torch.dtype) -> bool:
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    key = f"{processor().name}, {threads}, {native.instruction_set(native.load()[0])}"
    kept = files.recall(_FILE, key)
    answers = kept if isinstance(kept, dict) else {}
    own = answers.get(str(dtype))
    if not isinstance(own, bool):
        own = _gain(dtype) > _MARGIN
        files.remember(_FILE, key, {**answers, str(dtype): own})
    return own


def _gain(dtype: torch.dtype) -> float:
    """How many times faster than torch's the own product is; medians of interleaved runs."""
    from fastmp.backends import torch_linear
    from fastmp.backends.cpu.linear import gemm

    x, w = (torch.ones(_SIDE, _SIDE, dtype=dtype, device="cpu") for _ in range(2))
    runs: tuple[Callable[[], Tensor], ...] = (
        lambda: gemm(x, w.t(), (_SIDE, _SIDE)),
        lambda: torch_linear.product(x, w, None),
    )
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times[0]) < 3:
        for run, spent in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    return median(times[1]) / median(times[0])


def describe(cpu: Processor) -> str:
    """For reports, without measuring: "products of its own in float16, torch's in ..."."""
    kinds = {True: "of its own in", False: "torch's in", None: "measured at first use in"}
    dtypes: dict[bool | None, list[str]] = {}
    for dtype in DTYPES:
        dtypes.setdefault(from_table(cpu, dtype), []).append(str(dtype).removeprefix("torch."))
    parts = [f"{kinds[k]} {', '.join(dtypes[k])}" for k in kinds if k in dtypes]
    return f"products {', '.join(parts)}"
