"""mix on the Triton kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.backends import registry, triton
from fastmp.backends.abi import unsupported_dtype


def _supports(input: Tensor, *others: Any) -> str | None:
    return unsupported_dtype(input.dtype, others[-1]) or triton.supports_device(input.device)


def mix(input: Tensor, *others: Any) -> Tensor:
    """``fastmp::mix``."""
    from fastmp.backends.triton.kernels import mix as kernels

    with torch.cuda.device_of(input):
        return kernels.mix(input, *others)


registry.register("mix", "cuda", mix, backend="triton", supports=_supports)
