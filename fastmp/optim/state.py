"""The state of an optimizer: allocation, masters, loading without rounding.

One dict a parameter under torch's keys, as in torch's optimizers. Moments are of the optimizer's
kind (``state_kinds``); 8-bit ones have ``scales`` beside them. 16-bit parameters have one more
entry: ``master`` (fp32, beside fp16 weights) or ``remainder`` (int16, beside bf16 weights; with
``master="split"`` ``remainder_fp16`` beside fp16 ones).
Optimizers that average have ``average`` (fp32).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastmp.backends.native_table import is_dense
from fastmp.ops.update import current_master, join_master, split_master
from fastmp.optim import state_kinds
from fastmp.optim.remainders import Remainders

MASTER_KEYS = {torch.float16: "master", torch.bfloat16: "remainder"}
SPLIT_KEYS = {torch.float16: "remainder_fp16", torch.bfloat16: "remainder"}  # master="split"
#: The dtype of the weight that each of them belongs to.
MASTERS = {
    "master": torch.float16, "remainder": torch.bfloat16, "remainder_fp16": torch.float16
}  # fmt: skip

States = MutableMapping[Tensor, dict[str, Any]]


def _dtype_of(key: str, param_dtype: torch.dtype) -> torch.dtype:
    if key in SPLIT_KEYS.values():
        return torch.int16
    fp64 = param_dtype == torch.float64 and key != "step"
    return torch.float64 if fp64 else torch.float32


def master_key(param: Tensor, split: bool) -> str | None:
    """The entry that completes a parameter to its fp32 value; None: it has none."""
    return (SPLIT_KEYS if split else MASTER_KEYS).get(param.dtype)


def _own_master(param: Tensor, state: Mapping[str, Any]) -> Tensor | None:
    """What a state has of ``master_key``, for either kind."""
    own = (state[k] for k, dtype in MASTERS.items() if dtype == param.dtype and k in state)
    return next(own, None)


# ---- new state ----


def allocate(
    states: States,
    params: Iterable[Tensor],
    keys: Sequence[str],
    kind: torch.dtype,
    *,
    split: bool = False,
) -> None:
    """Allocate missing state."""
    for param in params:
        master = master_key(param, split)
        own, moments = states[param], state_kinds.dtype_for(param, kind)
        for key in (*keys, *([] if master is None else [master]), "step"):
            if own.get(key) is None:
                dtype = moments if key in keys else _dtype_of(key, param.dtype)
                own[key] = _new(key, param.detach(), dtype)
        if moments == torch.uint8 and keys and len(own.get("scales", ())) < len(keys):
            state_kinds.allocate_scales(own, param, len(keys))


def _new(key: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own: of one that shares its memory ``torch.save`` writes all that is shared.

    A kernel reads state fastest from multiples of 512 bytes, where CUDA's allocator puts it.
    """
    if key == "step":
        return torch.zeros((), dtype=torch.float32, device=param.device)
    if key == "master":
        return param.to(dtype)
    return torch.zeros_like(param, dtype=dtype)  # a remainder too: no rest


def master_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The fp32 or fp64 value of a parameter; no copy for fp32 and fp64."""
    own = _own_master(param, state)
    if own is None:
        return param.detach().float() if param.dtype.itemsize == 2 else param.detach()
    of = join_master if own.dtype == torch.int16 else current_master
    return of(param.detach(), own)


def check_shapes(values: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Refuse values that are not one for each parameter.

    Raises:
        ValueError: another number of values, or one of another shape.
    """
    if [v.shape for v in values] != [p.shape for p in params]:
        raise ValueError(
            f"expected {len(params)} values of the parameters' shapes, got {len(values)}: "
            f"{[tuple(v.shape) for v in values]}"
        )


def set_master(param: Tensor, state: Mapping[str, Any], value: Tensor) -> None:
    """Set a parameter, whose state is allocated, to an fp32 value, to the bit."""
    own = _own_master(param, state)
    if own is not None and own.dtype == torch.int16:
        value, remainder = split_master(value, param.dtype)
        own.copy_(remainder)
    elif own is not None:
        own.copy_(value)
    param.copy_(value)


# ---- state from elsewhere ----


@torch.no_grad()
def adopt_masters(states: States, params: Iterable[Tensor], remainders: Remainders) -> None:
    """Take over masters that belong to another dtype than the parameter's, or of another kind.

    They come with a state that was saved under that dtype, or from a model that was cast after
    training. Model and optimizer may be loaded in either order, so this runs at the first use of
    the state. A master counts, element by element, where it rounds to the weight that is there.
    Remainders count where ``remainders`` finds the weights to be those that they belong to.
    """
    for param in params:
        state = states.get(param, {})
        own = master_key(param, remainders.split_fp16)
        for key, dtype in MASTERS.items():
            if key == own or key not in state:
                continue
            saved = state.pop(key).to(param.device)
            if saved.dtype == torch.int16:
                saved = remainders.before_cast(param, saved, dtype)
            if saved is None:
                continue
            value = _value_under(param, dtype, saved, state)
            if own is not None and own not in state:
                state[own] = _new(own, param.detach(), _dtype_of(own, param.dtype))
            set_master(param, state, value)
            remainders.adopt_cast(param)


def _value_under(
    param: Tensor, dtype: torch.dtype, saved: Tensor, state: Mapping[str, Any]
) -> Tensor:
    """The value of ``param`` according to the master that ``saved`` is, or completes, in ``dtype``.

    It counts where the weight of ``dtype`` or the master itself, cast, is what ``param`` holds.
    """
    present = master_of(param, state)
    if saved.dtype != torch.int16:
        master, weight = saved, saved.to(dtype)
        usable = master.isfinite()
    elif dtype == torch.float16:
        weight = param.detach().to(dtype)
        master = join_master(weight, saved)
        usable = weight.isfinite()
    else:  # beside a zero a remainder is at most 1e-40, or from another weight
        weight = param.detach().to(dtype)
        master = join_master(weight, saved)
        usable = weight.isfinite() & (weight != 0)
    counts = (weight.to(param.dtype) == param) | (master.to(param.dtype) == param)
    return torch.where(counts & usable, master.to(present.dtype), present)


def normalize(
    state: dict[str, Any], param: Tensor, keys: tuple[str, ...], kind: torch.dtype
) -> None:
    """Bring state that was replaced or moved into the dtype, device and stride order of the kernel.

    A weight that became channels_last after its first step, say, has moments in another order.

    Raises:
        ValueError: state of another shape than its parameter.
    """
    step = state["step"]
    if not (isinstance(step, Tensor) and step.dtype == torch.float32 and step.shape == ()) or (
        step.device != param.device
    ):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=param.device)
    for key in (*keys, *MASTERS, "average"):
        value = state.get(key)
        if value is None:
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"state {key!r}: expected shape {tuple(param.shape)}, got {tuple(value.shape)}"
            )
        if key in keys:
            continue
        dtype = _dtype_of(key, param.dtype)
        same_order = value.stride() == param.stride() or not is_dense(param)
        if value.dtype != dtype or value.device != param.device or not same_order:
            state[key] = torch.empty_like(param, dtype=dtype).copy_(value)
    state_kinds.convert(state, param, keys, kind)


def counts_of(states: Mapping[Any, Mapping[str, Any]]) -> dict[str, int]:
    """The number of applied steps according to the ``step`` of every parameter, if they have one.

    A parameter without a gradient is passed over, so the largest counts.
    """
    steps = [int(state["step"]) for state in states.values() if "step" in state]
    return {"applied": max(steps, default=0)} if steps or not states else {}


class _Shielded:
    """Carries a tensor through ``Optimizer.load_state_dict``, which casts bare ones to the
    parameter's dtype: an fp16 second moment of 1e-9 would load as 0."""

    def __init__(self, value: Tensor):
        self.value = value


def shield_from_cast(loaded: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """A ``state_dict`` whose tensors torch will not cast; ``to_own_state`` unwraps them.

    Raises:
        ValueError: state of another shape than its parameter, or 8-bit moments without scales.
    """
    indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    for index, param in zip(indices, params, strict=False):  # torch compares the counts
        for key, value in loaded["state"].get(index, {}).items():
            if key in ("step", "scales") or not isinstance(value, Tensor):
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"state {key!r} of parameter {index}: expected shape {tuple(param.shape)}, "
                    f"got {tuple(value.shape)}; is this the state of another model?"
                )
        state_kinds.check(loaded["state"].get(index, {}), param, index)
    state = {param: _shielded(values) for param, values in loaded["state"].items()}
    return {**loaded, "state": state}


def _shielded(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: _Shielded(value) if isinstance(value, Tensor) and key != "step" else value
        for key, value in values.items()
    }


def to_own_state(
    param: Tensor, state: dict[str, Any], keys: tuple[str, ...], kind: torch.dtype
) -> None:
    """Turn loaded values into this optimizer's own: copies, rounded only to another kind."""
    loaded = {k: v.value if isinstance(v, _Shielded) else v for k, v in state.items()}
    if "step" not in loaded and loaded.get("momentum_buffer") is not None:
        loaded["step"] = 1.0  # torch's SGD counts no steps, but a buffer means there was one
    state.clear()
    loaded = state_kinds.from_saved(loaded, keys)
    for key, value in loaded.items():
        if value is None:  # torch's SGD before its first step
            continue
        if key in SPLIT_KEYS.values() and value.dtype != torch.int16:
            continue  # cast by torch's optimizer, whose steps change the weight that it completes
        if key == "step":
            value = torch.tensor(float(value), dtype=torch.float32, device=param.device)
        elif key in keys or key == "scales":
            value = value.to(param.device, copy=True)
        elif key in MASTERS or key == "average":
            dtype = _dtype_of(key, param.dtype)
            value = torch.empty_like(param, dtype=dtype).copy_(value)
        state[key] = value
    state_kinds.convert(state, param, keys, kind)
