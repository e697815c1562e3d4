"""The trained weights in fp32, from the state of a trainer, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastmp.files import atomic_write
from fastmp.optim.state import master_of

FILE = "model.safetensors"  # its name in a run folder

State = Mapping[str, Any]


def is_trainer_state(state: Any) -> bool:
    """Whether this is the state of a trainer, of which ``fp32_weights`` are known."""
    return isinstance(state, Mapping) and {"model", "optimizer", "ema", "progress"} <= state.keys()


def fp32_weights(state: State) -> dict[str, Tensor]:
    """The weights that are validated, not rounded to 16 bits: the averages, else the masters.

    Args:
        state: of a trainer, as ``Trainer.state_dict`` gives it or a checkpoint has it.

    Returns:
        the entries of the model's ``state_dict``; fp16 and bf16 ones are fp32.
    """
    weights = dict(state["model"])
    saved = state["optimizer"]["state"]
    for name, index in _param_index(state).items():
        weights[name] = master_of(weights[name], saved.get(index, {}))
    weights.update(state["ema"] or {})
    return {name: _wide(value) for name, value in weights.items()}


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _param_index(state: State) -> dict[str, int]:
    """The number in the optimizer of each parameter; older states have names in their groups."""
    if "param_index" in state:
        return dict(state["param_index"])
    groups = state["optimizer"]["param_groups"]
    names = [name for group in groups for name in group.get("param_names", ())]
    numbers = [number for group in groups for number in group["params"]]
    return dict(zip(names, numbers, strict=True)) if names else {}


def write(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write weights as one safetensors file, whole or not at all.

    Args:
        path: of the file.
        weights: by name; stored contiguously, each on its own.
        about: the file's metadata.

    Raises:
        OSError: it cannot be written.
    """
    # a copy each: safetensors refuses tensors that share memory, as tied weights do
    own = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in weights.items()}
    atomic_write(path, _in_order(save(own, metadata={"format": "pt", **about})))


def _in_order(content: bytes) -> bytes:
    """The same file with sorted metadata: safetensors writes them in a new order every time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
