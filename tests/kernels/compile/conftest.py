"""Processes that compile, and a table of the kernels.

The table needs one process: ``pytest -n 0 tests/kernels/compile``.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.kernels.compile.harness import (
    ARCHITECTURES,
    BLOCK_SHARED,
    compile_for,
    without_interpreter,
)

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

_made = []


@pytest.fixture(scope="session")
def pool():
    # Processes of their own: this one may have loaded Triton as an interpreter.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        torch.get_num_threads(), spawn, initializer=without_interpreter
    ) as pool:
        yield pool


@pytest.fixture
def compiled(pool, request):
    """``compiled(launch, *arguments)``: its kernels for every architecture.

    Each is checked for spills, local memory, shared memory that fits, and that it waits for the
    launch ahead of it before it touches memory, if it may begin before that has ended. But for
    ``table_loads``, by the kernel's name: of memory that the host wrote once, which no launch does.
    """

    def compiled(launch, *arguments, table_loads=None):
        jobs = [pool.submit(compile_for, arch, launch, arguments) for arch in ARCHITECTURES]
        kernels = [kernel for job in jobs for kernel in job.result()]
        case = request.node.callspec.id if hasattr(request.node, "callspec") else request.node.name
        _made.extend((case, kernel) for kernel in kernels)
        for kernel in kernels:
            where = f"{kernel.name} for sm_{kernel.arch}"
            assert kernel.stays_in_registers(), f"{where} spills"
            assert kernel.shared <= BLOCK_SHARED[kernel.arch], f"{where}: too much shared memory"
            at_once = kernel.accesses_before_wait if kernel.early else 0
            assert at_once <= (table_loads or {}).get(kernel.name, 0), f"{where} does not wait"
        return kernels

    return compiled


def pytest_terminal_summary(terminalreporter):
    """Registers, shared memory and occupancy of each kernel; equal rows once."""
    rows = defaultdict(dict)
    for case, kernel in _made:
        name = kernel.name.removeprefix("_").removesuffix("_kernel")
        rows[name, case][kernel.arch] = kernel
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("kernels on sm_" + ", ".join(map(str, ARCHITECTURES)))
    columns = ("registers", "shared KiB", "occupancy %")
    write(f"{'kernel':20}{'first case':46}{'warps':>6}" + "".join(f"{c:>18}" for c in columns))
    seen = set()
    for (name, case), kernels in rows.items():
        made = [kernels[arch] for arch in ARCHITECTURES if arch in kernels]
        columns = (
            "/".join(str(k.registers) for k in made),
            "/".join(f"{k.shared / 1024:.0f}" for k in made),
            "/".join(f"{100 * k.occupancy():.0f}" for k in made),
        )
        if (name, made[0].warps, columns) in seen:
            continue
        seen.add((name, made[0].warps, columns))
        write(
            f"{name:20}{case.removeprefix('test_'):46}{made[0].warps:6}"
            + "".join(f"{c:>18}" for c in columns)
        )
