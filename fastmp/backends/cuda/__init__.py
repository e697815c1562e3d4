"""The CUDA backend for NVIDIA GPUs: its requirements. NVRTC compiles the kernel at first use.

NVRTC and the driver are called through ``cuda.bindings``, which comes with torch's CUDA wheels and
is imported at first use only. No CUDA toolkit is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache

import torch

from fastmp.backends import registry


@cache
def load() -> tuple[bool, str]:
    """Whether the kernel can be compiled, and the reason.

    Raises:
        RuntimeError: it cannot, and ``FASTMP_BACKEND`` demands it.
    """
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif importlib.util.find_spec("cuda.bindings") is None:
        reason = "cuda.bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc"
    else:
        reason = f"NVRTC through cuda.bindings {importlib.metadata.version('cuda-bindings')}"
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
