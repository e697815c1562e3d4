"""Kinds of states that an optimizer keeps its moments in: fp32, bf16 or 8 bits; conversions.

Steps round stochastically. A conversion, of a running optimizer or of a loaded state, rounds once,
to nearest; to fp32, and back to the kind it came from, it is exact. Tensors below 4,096 elements
stay in fp32 where the kind is 8 bits, and fp64 parameters have fp64 moments whatever the kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmp.backends.native_table import is_dense
from fastmp.ops.update import state_kinds
from fastmp.ops.update.state_kinds import Quantity, blocks_of

#: ``state_dtype`` of the optimizers, and the dtype of the moments.
KINDS: dict[Any, torch.dtype] = {
    None: torch.float32,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    "8bit": torch.uint8,
}
MIN_8BIT_NUMEL = 4096
_SAVED_CODES = "_8bit"
_QUANTITIES = {"exp_avg_sq": Quantity.SQUARE, "max_exp_avg_sq": Quantity.MAXIMUM}


def parse(state_dtype: Any) -> torch.dtype:
    """The dtype of the moments.

    Raises:
        ValueError: another kind.
    """
    known = isinstance(state_dtype, str | torch.dtype | None) and state_dtype in KINDS
    if not known:
        raise ValueError(
            "state_dtype: expected None, torch.float32, torch.bfloat16 or '8bit', got "
            f"{state_dtype!r}"
        )
    return KINDS[state_dtype]


def dtype_for(param: Tensor, kind: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's moments under a kind."""
    if param.dtype == torch.float64:
        return torch.float64
    small = kind == torch.uint8 and param.numel() < MIN_8BIT_NUMEL
    return torch.float32 if small else kind


def allocate_scales(own: dict[str, Any], param: Tensor, count: int) -> None:
    """Scales of 8-bit moments, of which there may be more than before."""
    scales = torch.zeros((count, blocks_of(param.numel())), dtype=torch.uint8, device=param.device)
    known = own.get("scales")
    if known is not None:
        scales[: len(known)] = known
    own["scales"] = scales


def widen(own: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The state of a parameter, or a saved one, with moments in fp32, or fp64, and without scales.

    Exact.
    """
    own = from_saved(own, keys)
    wide = {key: value for key, value in own.items() if key != "scales"}
    for i, key in enumerate(keys):
        value = own.get(key)
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.uint8):
            scales = own["scales"][i] if value.dtype == torch.uint8 else None
            wide[key] = state_kinds.load(value, _QUANTITIES.get(key, Quantity.SIGNED), scales)
    return wide


def convert(own: dict[str, Any], param: Tensor, keys: Sequence[str], kind: torch.dtype) -> None:
    """Bring the moments of a parameter to a kind, its device and strides, in place."""
    dtype = dtype_for(param, kind)
    present = [key for key in keys if own.get(key) is not None]
    if all(_fits(own[key], param, dtype) for key in present) and (
        dtype == torch.uint8 or "scales" not in own
    ):
        return
    wide = widen(own, keys)
    own.pop("scales", None)
    if dtype == torch.uint8:
        allocate_scales(own, param, len(keys))
    for key in present:
        values = wide[key]
        if dtype not in (torch.uint8, torch.bfloat16):
            own[key] = torch.empty_like(param, dtype=dtype).copy_(values)
            continue
        values = torch.empty_like(param, dtype=torch.float32).copy_(values)
        own[key] = torch.empty_like(param, dtype=dtype)
        scales = own["scales"][keys.index(key)] if dtype == torch.uint8 else None
        quantity = _QUANTITIES.get(key, Quantity.SIGNED)
        state_kinds.store(values, own[key], quantity, scales, None)


def _fits(value: Tensor, param: Tensor, dtype: torch.dtype) -> bool:
    same_order = value.stride() == param.stride() or not is_dense(param)
    return value.dtype == dtype and value.device == param.device and same_order


def to_save(own: dict[str, Any]) -> dict[str, Any]:
    """A state for files. Codes get names that no other optimizer takes for those of moments, and
    their stride: blocks follow the memory, whose order files do not keep."""
    codes = _codes(own)
    if not codes:
        return own
    saved = {key + _SAVED_CODES if key in codes else key: value for key, value in own.items()}
    stride = {} if own[codes[0]].is_contiguous() else {"stride": tuple(own[codes[0]].stride())}
    return {**saved, **stride}


def from_saved(saved: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The inverse of ``to_save``; of another state, a copy."""
    own = {key.removesuffix(_SAVED_CODES): value for key, value in saved.items()}
    stride = own.pop("stride", None)
    for key in keys if stride is not None else ():
        if isinstance(own.get(key), Tensor):
            empty = own[key].new_empty_strided(own[key].shape, tuple(stride))
            own[key] = empty.copy_(own[key])
    return own


def _codes(own: Mapping[str, Any]) -> list[str]:
    tensors = (k for k, v in own.items() if isinstance(v, Tensor) and v.dtype == torch.uint8)
    return [key for key in tensors if key != "scales"]


def check(own: Mapping[str, Any], param: Tensor, index: int) -> None:
    """Refuse 8-bit moments without the scales that they need.

    Raises:
        ValueError: they are missing, or of another shape.
    """
    codes, scales = _codes(own), own.get("scales")
    expected = (len(codes), blocks_of(param.numel()))
    shape = None if scales is None else tuple(scales.shape)
    if codes and (shape is None or shape[1:] != expected[1:] or shape[0] < expected[0]):
        raise ValueError(
            f"state {codes[0]!r} of parameter {index} has 8 bits: expected scales of shape "
            f"{expected} beside it, got {shape}; is it the state of another kind of optimizer?"
        )
