"""The CUDA kernel for NVIDIA GPUs: what it needs. It is compiled at first use, by NVRTC.

``cuda.bindings``, through which NVRTC and the driver are called, comes with torch's CUDA wheels and
is imported at the first use only. No CUDA toolkit is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache

import torch

from fastmp import backends


@cache
def load() -> tuple[bool, str]:
    """Whether the kernel can be compiled, and what there is in words.

    Raises:
        RuntimeError: it cannot, and ``FASTMP_BACKEND`` demands it.
    """
    found = False
    if torch.version.cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif importlib.util.find_spec("cuda.bindings") is None:
        reason = "cuda.bindings is not installed: pip install cuda-bindings nvidia-cuda-nvrtc"
    else:
        found = True
        reason = f"NVRTC through cuda.bindings {importlib.metadata.version('cuda-bindings')}"
    if not found and backends.required() == "cuda":
        raise RuntimeError(f"FASTMP_BACKEND=cuda, but {reason}")
    return found, reason


def serves(op: str) -> bool:
    """Whether the kernel of ``op`` can be used; notes the answer in the report."""
    found, reason = load()
    backends.record(op, "cuda", "cuda" if found else "reference", reason)
    return found


@cache
def runs_on(device: torch.device) -> tuple[bool, str]:
    """Whether the kernel runs on this device, with the reason. Says so loudly, once, if not."""
    found, reason = load()
    if not found:
        return found, reason
    from fastmp.backends.cuda import nvrtc

    capability = torch.cuda.get_device_capability(device)
    try:
        nvrtc.target(capability[0] * 10 + capability[1])
    except RuntimeError as error:
        backends.withdraw("cuda", f"{torch.cuda.get_device_name(device)}: {error}")
        return False, str(error)
    return True, reason
