"""Compiles the kernels of a launch without a GPU, and reads their machine code.

The launchers run as they are, on tensors in main memory. A stand-in for Triton's driver names the
architecture, and a launch stops once the kernel is compiled: the arguments, their alignment and so
the machine code are those of a real call.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100, 120)
#: Shared memory of a block and of a multiprocessor in bytes; warps of a multiprocessor.
BLOCK_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SM_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
SM_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}


@cache
def spilled_registers() -> int:
    """How many registers of a thread may lie on the stack: none.

    The compilers that go with the oldest supported versions, ptxas of Triton 3.6 and NVRTC 13.0,
    spill 2 to 4 in 4 of the 105 cases, for sm_80 and sm_120.
    """
    major, minor, *_ = importlib.metadata.version("triton").split(".")
    return 4 if (int(major), int(minor)) < (3, 7) else 0


class Kernel(NamedTuple):
    """One compiled kernel: its resources, and how often each machine instruction stands in it.

    A loop is what lies between a label and a jump back to it. A launch that is ``early`` may begin
    before the one ahead of it has ended; ``accesses_before_wait`` counts its loads and stores of
    global memory before it waits for that.
    """

    name: str
    arch: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    instructions: Counter[str]
    loops: tuple[Counter[str], ...]
    accesses_before_wait: int
    early: bool = False

    def stays_in_registers(self) -> bool:
        """Neither local arrays nor more spills than this compiler is known for."""
        most = spilled_registers()
        return self.local == 0 and self.spills <= most and self.stack <= 4 * most

    def count(self, pattern: str) -> int:
        """How many instructions match, e.g. ``r"LDG.*\\.128"``."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def loop(self, **counts: int) -> int:
        """How many instructions the shortest loop has with so many of these, e.g. ``MUFU=8``."""
        return min(
            sum(body.values())
            for body in self.loops
            if all(
                sum(n for name, n in body.items() if name.partition(".")[0] == kind) == count
                for kind, count in counts.items()
            )
        )

    def occupancy(self) -> float:
        """Resident warps over possible warps, by registers, shared memory and blocks."""
        a_warp = -(-self.registers // 8) * 8 * 32
        by_registers = 65536 // a_warp // self.warps
        by_shared = SM_SHARED[self.arch] // (self.shared + 1024)
        blocks = min(by_registers, by_shared, SM_WARPS[self.arch] // self.warps, 32)
        return blocks * self.warps / SM_WARPS[self.arch]


class _Driver:
    """Triton's driver, as far as compiling needs one."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def without_interpreter() -> None:
    """Prepare a process for compiling; before it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # today's default, set so that 3.9 does not warn


def compile_for(
    arch: int, launch: Callable[..., object], arguments: tuple[Any, ...]
) -> list[Kernel]:
    """The kernels that ``launch(*arguments)`` launches, compiled for one architecture."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver(arch))
    kernels: list[Kernel] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **{**kwargs, "warmup": True})
        meta = compiled.metadata
        made = look_at(self.__name__, arch, compiled.asm["cubin"], meta.num_warps, meta.shared)
        kernels.append(made._replace(early=meta.launch_pdl))
        return compiled

    JITFunction.run = compile_only
    try:
        launch(*arguments)
    finally:
        JITFunction.run = run
    return kernels


def record_launches(launch: Callable[..., object], arguments: tuple[Any, ...]) -> list[Any]:
    """The launches of ``launch(*arguments)`` for sm_90: kernel, grid, stream, arguments.

    Addresses stand for tensors. The kernels are compiled and do not run.
    """
    import triton

    made: list[Any] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name, self.kinds = metadata.name, list(source.signature.values())

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            given = zip(rest[-len(self.kinds) :], self.kinds, strict=True)
            args = [getattr(a, "data_ptr", lambda a=a: a)() for a, k in given if k != "constexpr"]
            made.append((self.name, (x, y, z), stream, args))

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 0, 0, 32, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": BLOCK_SHARED[90]}

    class Driver(_Driver):
        launcher_cls, utils = Launcher, Utils()

    triton.runtime.driver.set_active(Driver(90))
    launch(*arguments)
    return made


def look_at(name: str, arch: int, cubin: bytes, warps: int, shared: int) -> Kernel:
    """Read machine code, whichever compiler made it, with the disassembler that Triton brings."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, *flags, file.name], capture_output=True, text=True, check=True
            ).stdout
            # -ndf: without an analysis of the data flow, which takes half of its time
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-ndf"))
        )
    # An address in a comment, perhaps a predicate, and the instruction with its modifiers.
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)"
    loops, labels = [], {}
    lines = code.splitlines()
    for i, text in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", text):
            labels[label[1]] = i
        elif (jump := re.search(r"BRA `\((\.L_\w+)\)", text)) and jump[1] in labels:
            body = "\n".join(lines[labels[jump[1]] : i + 1])
            loops.append(Counter(re.findall(line, body, re.MULTILINE)))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    in_order = re.findall(line, code, re.MULTILINE)
    before_wait = in_order[: in_order.index("ACQBULK")] if "ACQBULK" in in_order else in_order
    instructions = Counter(in_order)
    return Kernel(
        name,
        arch,
        warps,
        int(found["REG"]),
        int(found["STACK"]),
        int(found["LOCAL"]),
        shared,
        sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL"))),
        instructions,
        tuple(loops),
        sum(1 for name in before_wait if re.match(r"(LD|ST|ATOM|RED)G?\b|LDGSTS", name)),
    )
