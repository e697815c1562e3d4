"""Checkpoints: safetensors and JSON, no pickle; a crash during a save leaves the last one whole.

A checkpoint is a folder with one ``tensors-<sum>.safetensors`` and one ``manifest.json``. The
manifest holds the nested state with every tensor replaced by its name, the size and sha256 of the
tensor file, and its own sha256. One atomic rename of the manifest makes a new checkpoint the
current one: before it the old pair is complete, after it the new one. (A finished folder cannot be
renamed over an old one: POSIX replaces only empty folders.)

Every value is restored bit for bit: dicts with str or int keys, lists, tuples, None, bools, ints,
floats (infinities and NaN too), strings, and dense tensors of any dtype of safetensors. NumPy's
numbers and arrays without dimensions come back as Python's, as do enumerations of numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fastmp.files import atomic_write

FORMAT = "fastmp-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"

_TENSOR_FILE = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: the file, what was expected, what came."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` as the checkpoint at ``path``, replacing one that is there.

    Tensors are copied to the CPU and stored contiguously; of a view its own elements are stored.

    Raises:
        CheckpointError: the state has a value of a type not listed above; nothing was written.
        OSError: the files cannot be written; the previous checkpoint is still whole.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    payload = save_tensors(tensors)
    digest = hashlib.sha256(payload).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    content = {
        "tensors": {"file": name, "bytes": len(payload), "sha256": digest},
        "state": tree,
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _content_sum(content),
        "content": content,
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / name, payload)
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    for old in folder.iterdir():
        if old.name != name and (_TENSOR_FILE.fullmatch(old.name) or old.suffix == ".partial"):
            old.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state saved at ``path``, verified; tensors are on the CPU.

    Raises:
        CheckpointError: missing, corrupt, truncated or of another format version.
    """
    folder = Path(path)
    content = _read_manifest(folder / MANIFEST)
    entry = content["tensors"]
    if not _TENSOR_FILE.fullmatch(entry["file"]):
        raise _corrupt_error(
            folder / MANIFEST, "the name of a tensor file beside it", entry["file"]
        )
    file = folder / entry["file"]
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise _corrupt_error(file, f"{entry['bytes']} bytes", str(error)) from error
    if len(payload) != entry["bytes"]:
        raise _corrupt_error(file, f"{entry['bytes']} bytes", f"{len(payload)} bytes")
    digest = hashlib.sha256(payload).hexdigest()
    if digest != entry["sha256"]:
        raise _corrupt_error(file, f"sha256 {entry['sha256']}", digest)
    try:
        tensors = load_tensors(payload)
    except SafetensorError as error:
        raise _corrupt_error(file, "a safetensors file", str(error)) from error
    try:
        state: dict[str, Any] = _restore(content["state"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        expected = "a state whose tensors are in the file beside it"
        raise _corrupt_error(folder / MANIFEST, expected, repr(error)) from error
    return state


def read_entry(path: str | os.PathLike[str], key: str) -> Any:
    """One entry, without tensors, of the state saved at ``path``; the tensor file is not read.

    Raises:
        CheckpointError: the manifest is missing, corrupt or of another format version.
        KeyError: there is no such entry.
    """
    (pairs,) = _read_manifest(Path(path) / MANIFEST)["state"].values()
    return _restore(dict(pairs)[key], {})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise _corrupt_error(path, "a checkpoint manifest", str(error)) from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise _corrupt_error(path, "a whole JSON file", str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _corrupt_error(path, f"format {FORMAT!r}", "another JSON file")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')!r}, this fastmp reads {VERSION}; "
            "load it with the fastmp that wrote it"
        )
    content: dict[str, Any] = manifest.get("content", {})
    if _content_sum(content) != manifest.get("sha256"):
        raise _corrupt_error(path, f"contents with sha256 {manifest.get('sha256')}", "another sum")
    return content


def _content_sum(content: Any) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _corrupt_error(path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: expected {expected}, found {found}; "
        "take an older checkpoint or another copy of this one"
    )


# In the manifest JSON values stand for themselves. Other types are an object with one "$" key. A
# dict is always written as pairs, so that no key of the state is read as such a tag.


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors are added to ``tensors``, under their path in the state."""
    value = _plain(value)
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{name}: only dense tensors can be saved, got {value.layout}")
        if name in tensors:  # {"a.b": x, "a": {"b": y}} or {1: x, "1": y}
            name = f"{name}#{len(tensors)}"
        # a copy: training goes on meanwhile, and safetensors refuses tensors that share memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        items = [(_plain(key), item) for key, item in value.items()]
        for key, _ in items:
            if type(key) not in (str, int):
                raise CheckpointError(f"{name}: keys must be str or int, got {key!r}")
        return {"$dict": [[k, _flatten(v, f"{name}.{k}", tensors)] for k, v in items]}
    raise CheckpointError(
        f"{name}: expected tensors, numbers, strings, None and dicts, lists or tuples of them, "
        f"got {type(value).__name__}"
    )


def _plain(value: Any) -> Any:
    """Numbers and strings of other types than Python's own as these, where no bit is lost."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if type(value) is bool:
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration its value
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    return value


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "$dict":
        return {key: _restore(item, tensors) for key, item in inner}
    if tag == "$tuple":
        return tuple(_restore(item, tensors) for item in inner)
    if tag == "$float":
        return float(inner)
    return tensors[inner]
