"""mix on the native library: tensors in, ``MixArgs`` across, a tensor out.

The formulas and the arguments are those of ``fastmp.ops.mix``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.backends import cpu, registry
from fastmp.backends.abi import DTYPE_CODES, unsupported_dtype
from fastmp.backends.cpu.structs import MixArgs


def mix(
    input: Tensor,
    lam: Tensor | None,
    index: Tensor | None,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mixed batch, (N, C, H, W), contiguous.

    Args:
        input: (N, C, H, W), of a dtype in ``DTYPE_CODES``; the rest as ``ops.mix.mix_reference``.
        dtype: that of the result, in ``DTYPE_CODES`` too.
    """
    output = torch.empty(input.shape, dtype=dtype, device="cpu")
    if output.numel() == 0:
        return output
    batch, channels, height, width = input.shape
    floats = [None if t is None else t.to(torch.float32).contiguous() for t in (lam, scale, shift)]
    integers = [None if t is None else t.contiguous() for t in (index, box)]
    input = input.contiguous()
    args = MixArgs(
        input=input.data_ptr(),
        output=output.data_ptr(),
        input_dtype=DTYPE_CODES[input.dtype],
        output_dtype=DTYPE_CODES[dtype],
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        lam_stride=0 if lam is None else lam.dim(),
        box_stride=4 if box is not None and box.dim() == 2 else 0,
    )
    addresses = [None if t is None else t.data_ptr() for t in floats + integers]
    args.lam, args.scale, args.shift, args.index, args.box = addresses
    cpu.call("fastmp_mix", args)
    return output


def _supports(input: Tensor, *others: Any) -> str | None:
    return unsupported_dtype(input.dtype, others[-1])


registry.register("mix", "cpu", mix, backend="cpu", supports=_supports)
