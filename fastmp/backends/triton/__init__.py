"""The Triton backend for NVIDIA GPUs: its requirements, and properties of a device.

``<operation>.py`` registers the kernels of an operation. Triton is imported by ``kernels`` only, at
the first call: ``import fastmp`` does not.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache

import torch

from fastmp.backends import registry

#: Compute capability from which on the kernels are compiled and inspected.
MINIMUM_CAPABILITY = (8, 0)


@cache
def load() -> tuple[str | None, str]:
    """Triton's version, or None, and the reason.

    Raises:
        RuntimeError: the kernels cannot run and ``FASTMP_BACKEND`` demands them.
    """
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    else:
        try:
            version = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            reason = "Triton is not installed: pip install triton"
        else:
            reason = f"Triton {version}, on GPUs of compute capability 8.0 and newer"
            registry.mark_available("triton", reason)
            return version, reason
    registry.mark_unavailable("triton", reason, warn=False)
    return None, reason


@cache
def supports_device(device: torch.device) -> str | None:
    """None, or the reason why the kernels do not run on this device. Warns once, if so.

    CPU tensors arrive only under TRITON_INTERPRET=1.
    """
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= MINIMUM_CAPABILITY:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    reason = f"{name} has compute capability {major}.{minor}, the kernels need 8.0"
    registry.mark_unavailable("triton", reason)
    return reason


@cache
def num_sms(device: torch.device) -> int:
    """How many multiprocessors the device has; 2 for the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0 and so on; on the CPU Triton's target.

    In the interpreter, which has no target, 90: the kernels with TMA run there too.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor
    import triton

    if triton.knobs.runtime.interpret:
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)


load()
