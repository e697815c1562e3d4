"""The Triton kernels for NVIDIA GPUs: what they need, and what they need to know of a device.

Triton itself is imported by the kernel files only, at the first call: ``import fastmp`` does not.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache

import torch

from fastmp import backends

#: Compute capability from which on the kernels are compiled and inspected.
MINIMUM_CAPABILITY = (8, 0)


@cache
def load() -> tuple[str | None, str]:
    """Triton's version, or None, and what there is in words.

    Raises:
        RuntimeError: the kernels cannot run and ``FASTMP_BACKEND`` demands them.
    """
    version: str | None = None
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    else:
        try:
            version = importlib.metadata.version("triton")
            reason = f"Triton {version}, on GPUs of compute capability 8.0 and newer"
        except importlib.metadata.PackageNotFoundError:
            reason = "Triton is not installed: pip install triton"
    if version is None and backends.required() == "triton":
        raise RuntimeError(f"FASTMP_BACKEND=triton, but {reason}")
    return version, reason


def serves(op: str, detail: str = "") -> bool:
    """Whether the kernels of ``op`` can be registered; notes the answer in the report."""
    version, reason = load()
    if version is None:
        backends.record(op, "cuda", "reference", reason)
    else:
        backends.record(op, "cuda", "triton", f"{reason}; {detail}" if detail else reason)
    return version is not None


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device. Says so once, here and in the report, if not.

    The CPU counts: only Triton's interpreter brings its tensors here.
    """
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    if capability >= MINIMUM_CAPABILITY:
        return True
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    reason = f"{name} has compute capability {major}.{minor}, the kernels need 8.0"
    backends.withdraw("triton", reason)
    return False


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has; a few for the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0 and so on. On the CPU that which Triton compiles for.

    The interpreter compiles for nothing; there it is 90, so that it meets the kernels with TMA.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    import triton

    if triton.knobs.runtime.interpret:
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)
