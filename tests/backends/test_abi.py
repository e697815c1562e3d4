"""The layouts and codes of ``csrc/common/table.h`` and ``csrc/fastmp.h``, in C and in Python."""

import ctypes
import re
import shutil
import subprocess
from ctypes import c_double, c_float, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_void_p
from pathlib import Path

import pytest
import torch
from numpy.ctypeslib import as_ctypes_type

from fastmp.backends import cpu
from fastmp.backends.abi import (
    CHUNK,
    DTYPE_CODES,
    RECORD,
    ROW,
    Activation,
    Hyperparameters,
    Master,
    Reduction,
    Request,
    RingArgs,
    StateKind,
    StepArgs,
)
from fastmp.backends.cpu.structs import ABI_VERSION, ENTRY_POINTS, Status
from tests.native import needs_native

CSRC = Path(__file__).parents[2] / "csrc"
HEADERS = (CSRC / "common" / "table.h").read_text() + (CSRC / "fastmp.h").read_text()
HEADERS = re.sub(r"/\*.*?\*/", "", HEADERS, flags=re.DOTALL)


class HyperRow(ctypes.Structure):
    _fields_ = tuple((name, c_double) for name in Hyperparameters._fields)


def _snake(name):
    return re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", name)


MIRRORS = {
    "fastmp_row": as_ctypes_type(ROW),
    "fastmp_hyper": HyperRow,
    "fastmp_record": as_ctypes_type(RECORD),
    "fastmp_chunk": as_ctypes_type(CHUNK),
    "fastmp_request": Request,
    "fastmp_step_args": StepArgs,
    "fastmp_ring_args": RingArgs,
    **{f"fastmp{_snake(args.__name__)}": args for args in ENTRY_POINTS.values()},
}
TYPES = {
    "float": c_float, "double": c_double, "int32_t": c_int32, "int64_t": c_int64,
    "uint8_t": c_uint8, "uint16_t": c_uint16, "uint32_t": c_uint32, "fastmp_request": Request,
}  # fmt: skip


def c_structs():
    """The fields of every struct in the headers: name and ctypes type, an address being 64 bits."""
    for body, struct in re.findall(r"typedef struct \{([^}]*)\} (\w+);", HEADERS):
        fields = []
        for kind, declarators in re.findall(r"(?:const )?(\w+)([^;]+);", body):
            for declarator in declarators.split(","):
                star, name, count = re.fullmatch(r"(\*?) (\w+)(?:\[(\d+)\])?", declarator).groups()
                field = c_int64 if star else TYPES[kind]
                fields.append((name, field * int(count) if count else field))
        yield struct, fields


def c_enum(name):
    body = re.search(rf"enum {name} \{{([^}}]*)\}};", HEADERS)[1]
    return {label: int(code) for label, code in re.findall(r"FASTMP_(\w+) = (\d+)", body)}


def test_every_struct_has_the_same_fields_in_python():
    mirrors = {
        struct: [(name, c_int64 if kind is c_void_p else kind) for name, kind in mirror._fields_]
        for struct, mirror in MIRRORS.items()
    }
    assert dict(c_structs()) == mirrors


def test_a_c_compiler_finds_the_same_offsets():
    """And the header of the C ABI is C, not only C++."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here: nothing to ask for offsets")
    lines = ["#include <stddef.h>", f'#include "{CSRC / "fastmp.h"}"']
    for struct, mirror in MIRRORS.items():
        lines.append(f'_Static_assert(sizeof({struct}) == {ctypes.sizeof(mirror)}, "{struct}");')
        for name, _ in mirror._fields_:
            offset = getattr(mirror, name).offset
            lines.append(f'_Static_assert(offsetof({struct}, {name}) == {offset}, "{name}");')
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-xc", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_codes_and_version_agree():
    dtypes = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8
    }  # fmt: skip
    assert {dtypes[name]: code for name, code in c_enum("fastmp_dtype").items()} == DTYPE_CODES
    assert c_enum("fastmp_master") == dict(Master.__members__)
    kinds = {
        f"STATE_{name}".replace("BIT8", "8BIT"): int(k) for name, k in StateKind.__members__.items()
    }
    assert c_enum("fastmp_state_kind") == kinds
    assert c_enum("fastmp_status") == dict(Status.__members__)
    activations = {name: int(code) for name, code in Activation.__members__.items()}
    activations["IDENTITY"] = activations.pop("NONE")
    assert c_enum("fastmp_activation") == activations
    reductions = {name: int(code) for name, code in Reduction.__members__.items()}
    assert c_enum("fastmp_reduction") == reductions
    assert f"#define FASTMP_ABI_VERSION {ABI_VERSION}\n" in HEADERS


def test_every_entry_point_takes_the_same_struct():
    declared = re.findall(r"int32_t (fastmp_\w+)\((?:const )?(\w+)\* args\);", HEADERS)
    assert {name: MIRRORS[struct] for name, struct in declared} == ENTRY_POINTS


@needs_native
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_struct_of_another_size_is_refused(name):
    entry, struct = getattr(cpu.load()[0], name), ENTRY_POINTS[name]
    args = struct(size=ctypes.sizeof(struct) - 8)
    assert entry(ctypes.byref(args)) == Status.BAD_ARGUMENT
    assert entry(None) == Status.BAD_ARGUMENT
