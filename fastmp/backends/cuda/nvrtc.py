"""NVRTC: CUDA source to machine code, kept on disk.

The key of a cache entry is a digest of its inputs: sources, options, architecture, kernel and the
version of NVRTC. An entry is written atomically. It is read only if it belongs to this user and its
checksum is right; otherwise the kernel is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastmp import files

BLOCK_SIZE = 256  # threads
CHUNK_SIZE = 1024  # elements
# --fmad=false: as the CPU library, so that both give the same bits. The kernel waits for memory.
_OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    f"-DFASTMP_BLOCK_SIZE={BLOCK_SIZE}",
    f"-DFASTMP_CHUNK_SIZE={CHUNK_SIZE}",
)
_FORMAT = 1  # of an entry


class Image(NamedTuple):
    """Machine code for one architecture (or PTX, for one that NVRTC does not know yet)."""

    code: bytes
    kernel: str  # its mangled name


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else values


@cache
def version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        RuntimeError: NVRTC is not installed.
    """
    from cuda.bindings import nvrtc

    try:
        major, minor = _check(nvrtc.nvrtcVersion())
    except RuntimeError as error:
        raise RuntimeError(f"no NVRTC: {error}; pip install nvidia-cuda-nvrtc") from error
    return major, minor


def target(capability: int) -> str:
    """The architecture to compile for: 90 gives ``sm_90``, machine code.

    A GPU newer than this NVRTC gets PTX of the newest architecture before it, which the driver
    translates.

    Raises:
        RuntimeError: a GPU that this NVRTC no longer compiles for.
    """
    from cuda.bindings import nvrtc

    version()
    known = [int(arch) for arch in _check(nvrtc.nvrtcGetSupportedArchs())]
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        raise RuntimeError(f"compute capability {capability / 10}, NVRTC needs {min(known) / 10}")
    return f"compute_{max(older)}"


def source_folder() -> Path:
    """``csrc``: in the package as installed, beside it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def _sources() -> dict[str, bytes]:
    folder = source_folder()
    paths = sorted([*folder.glob("common/*"), *folder.glob("cuda/*")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def build(file: str, kernel: str, architecture: str) -> Image:
    """The machine code of ``kernel``, a C++ name with its template arguments; cached.

    Raises:
        RuntimeError: it does not compile; with NVRTC's log.
    """
    entry = _entry(file, kernel, architecture)
    image = _read(entry)
    if image is None:
        image = compile(file, kernel, architecture)
        _write(entry, image)
    return image


def compile(file: str, kernel: str, architecture: str) -> Image:
    """As ``build``, without the cache."""
    from cuda.bindings import nvrtc

    folder = source_folder()
    source = (folder / file).read_bytes()
    program = _check(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []))
    try:
        name = kernel.encode()
        _check(nvrtc.nvrtcAddNameExpression(program, name))
        include = f"--include-path={(folder / file).parent}"
        options = [o.encode() for o in (*_OPTIONS, f"--gpu-architecture={architecture}", include)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile {file}:\n{log.decode(errors='replace')}")
        mangled = _check(nvrtc.nvrtcGetLoweredName(program, name)).decode()
        if architecture.startswith("sm_"):
            code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
            nvrtc.nvrtcGetCUBIN(program, code)
        else:
            code = b" " * _check(nvrtc.nvrtcGetPTXSize(program))
            nvrtc.nvrtcGetPTX(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Image(code, mangled)


# ---- the cache ----


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _entry(file: str, kernel: str, architecture: str) -> Path:
    inputs = [file, kernel, architecture, *_OPTIONS, str(version()), str(_FORMAT)]
    sources = [part for name, text in _sources().items() for part in (name.encode(), text)]
    return files.cache_dir() / f"{_digest([m.encode() for m in inputs] + sources)}.cubin"


def _read(entry: Path) -> Image | None:
    """The image of a cache entry; None: no entry, not a whole one, or another user's."""
    try:
        with entry.open("rb") as file:
            if hasattr(os, "geteuid") and os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            head, code = json.loads(file.readline()), file.read()
        kernel, digest = head["kernel"], head["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if digest != _digest([entry.name.encode(), kernel.encode(), code]):
        return None
    return Image(code, kernel)


def _write(entry: Path, image: Image) -> None:
    digest = _digest([entry.name.encode(), image.kernel.encode(), image.code])
    head = json.dumps({"kernel": image.kernel, "sha256": digest}).encode()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(entry, head + b"\n" + image.code)
    except OSError as error:
        warnings.warn(
            f"fastmp compiles its kernel again in every process: {error}. "
            "Set FASTMP_CACHE to a folder that can be written to.",
            RuntimeWarning,
            stacklevel=2,
        )
