"""The CUDA backend for NVIDIA GPUs: its requirements. NVRTC compiles the kernel at first use.

NVRTC and the driver are called through ``cuda.bindings``, which comes with torch's CUDA wheels and
is imported at first use only. No CUDA toolkit is needed.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from fastmp.backends import registry


def has_bindings() -> bool:
    """Whether ``cuda.bindings`` is installed."""
    # find_spec of a part raises ModuleNotFoundError where the package itself is absent
    return all(map(importlib.util.find_spec, ("cuda", "cuda.bindings")))


@cache
def load() -> tuple[bool, str]:
    """Whether the kernel can be compiled, and the reason.

    Raises:
        RuntimeError: it cannot, and ``FASTMP_BACKEND`` demands it.
    """
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif not has_bindings():
        reason = "cuda.bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc"
    else:
        reason = "NVRTC through cuda.bindings"
        registry.mark_available("cuda", reason)
        return True, reason
    registry.mark_unavailable("cuda", reason, warn=False)
    return False, reason


@cache
def supports_device(device: torch.device) -> str | None:
    """None, or the reason why the kernel does not run on this device. Warns once, if so."""
    from fastmp.backends.cuda import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    try:
        nvrtc.target(major * 10 + minor)
    except RuntimeError as error:
        registry.mark_unavailable("cuda", f"{torch.cuda.get_device_name(device)}: {error}")
        return str(error)
    return None


load()
