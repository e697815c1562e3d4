"""Transfer learning: pretrained weights, a new head, frozen layers, layer-wise learning rates.

report = load_pretrained(model, "weights.safetensors")
replace_head(model, classes=2)
optimizer = fastmp.optim.AdamW(layerwise_lr(model, 1e-3, 0.7))
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import fastmp.nn
from fastmp import checkpoint
from fastmp.checkpoint import weights
from fastmp.checkpoint.manager import Checkpoints
from fastmp.optim.muon_groups import WRAPPERS

_SHOWN = 4  # names of each kind in a report


class TransferError(ValueError):
    """Weights that cannot be read or do not fit, or unknown names."""


# ---- weights ----


@dataclass(frozen=True)
class Report:
    """The entries of a model and of the source that ``load_pretrained`` copied from.

    ``loaded``: copied. ``missing``: not in the source. ``unexpected``: not in the model.
    ``reshaped``: (wanted, found) shapes that differ. Missing and reshaped entries of the model keep
    their values.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        shapes = [f"{name} {found} for {want}" for name, (want, found) in self.reshaped.items()]
        rest = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        parts = [f"{len(self.loaded)} loaded"]
        for kind, names in rest.items():
            if names:
                more = "" if len(names) <= _SHOWN else ", ..."
                parts.append(f"{len(names)} {kind} ({', '.join(list(names)[:_SHOWN])}{more})")
        return "; ".join(parts)


@torch.no_grad()
def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike[str] | nn.Module | Mapping[str, Any],
    *,
    prefix: str = "",
    strict: bool = False,
) -> Report:
    """Copy the weights of ``source`` into ``model``, in the model's dtype and on its device.

    Args:
        model: entries that do not fit keep their values.
        source: a .safetensors file; a file of ``torch.save`` with a state_dict, bare or under
            "state_dict" or "model" (read with weights_only: no code in it runs); a run's folder,
            which stands for its best checkpoint, its ``checkpoints``, one of these, or a file of
            one: the weights that were validated, in fp32; a module; a state_dict.
        prefix: of the model's names in the source, such as "backbone.".
        strict: refuse a source that does not fit entry by entry.

    Raises:
        TransferError: the source cannot be read, none of its entries fits, or with ``strict`` one
            does not. The model is then unchanged.
    """
    entries = _unwrapped(_entries(source), prefix)
    own = model.state_dict(keep_vars=True)
    fitting = [name for name in own if name in entries and entries[name].shape == own[name].shape]
    report = Report(
        loaded=tuple(fitting),
        missing=tuple(name for name in own if name not in entries),
        unexpected=tuple(name for name in entries if name not in own),
        reshaped={
            name: (tuple(own[name].shape), tuple(entries[name].shape))
            for name in own
            if name in entries and entries[name].shape != own[name].shape
        },
    )
    if not fitting and report.reshaped:
        raise TransferError(
            "no entry of the source fits the model: their names are equal and their shapes differ, "
            f"{_shapes(report.reshaped)}; is it of another model?"
        )
    if not fitting:
        raise TransferError(
            f"no entry of the source fits the model: the source has "
            f"{', '.join(list(entries)[:_SHOWN])}, the model {', '.join(list(own)[:_SHOWN])}; "
            "is a prefix missing?"
        )
    if strict and len(fitting) < max(len(own), len(entries)):
        raise TransferError(f"expected every entry to fit, got: {report}")
    for name in fitting:
        own[name].copy_(entries[name])
    return report


def _shapes(reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    shown = [
        f"{name} is {found} in the source and {wanted} in the model"
        for name, (wanted, found) in list(reshaped.items())[:_SHOWN]
    ]
    return ", ".join(shown) + (", ..." if len(reshaped) > _SHOWN else "")


def _entries(source: Any) -> dict[str, Tensor]:
    """The tensors of a source, by name."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source))
    if weights.is_trainer_state(source):
        source = weights.fp32_weights(source)
    for key in ("state_dict", "model"):
        if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
            source = source[key]
    tensors = {}
    if isinstance(source, Mapping):
        tensors = {str(name): v for name, v in source.items() if isinstance(v, Tensor)}
    if not tensors:
        raise TransferError(
            "expected a file, a checkpoint, a module or a state_dict with tensors, "
            f"got {type(source).__name__} without tensors"
        )
    return tensors


def _read(path: Path) -> Any:
    if not path.exists():
        raise TransferError(f"{path} does not exist; expected a file of weights or a checkpoint")
    try:
        path = _file_of_run(path)
        if path.is_dir():
            return checkpoint.load(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, checkpoint.CheckpointError) as error:
        raise TransferError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises any error of the unpickler
        raise TransferError(
            f"{path} cannot be read: expected .safetensors or a state_dict of torch.save without "
            f"other objects, got: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _file_of_run(path: Path) -> Path:
    """The checkpoint, or the file of weights, that a path of a run stands for; else the path."""
    folder = path if path.is_dir() else path.parent
    of_checkpoint = path.name == checkpoint.MANIFEST or path.name.startswith("tensors-")
    if (folder / checkpoint.MANIFEST).is_file() and (path.is_dir() or of_checkpoint):
        return folder
    if not path.is_dir():
        return path
    kept = path if path.name == "checkpoints" else path / "checkpoints"
    found = Checkpoints(kept).best() if os.path.lexists(kept) else None
    if found is None and (path / weights.FILE).is_file():
        return path / weights.FILE
    return found or path


def _unwrapped(entries: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if all(name.startswith(f"{wrapper}.") for name in entries):
            entries = {name.removeprefix(f"{wrapper}."): v for name, v in entries.items()}
    return {n.removeprefix(prefix): value for n, value in entries.items() if n.startswith(prefix)}


def replace_head(model: nn.Module, classes: int, name: str | None = None) -> nn.Module:
    """Replace the model's last linear layer by a newly initialised one with ``classes`` outputs.

    Args:
        model: changed in place; make the optimizer afterwards.
        classes: outputs of the new layer.
        name: of the layer. Default: the last ``nn.Linear`` of the model.

    Returns:
        the new layer, with the class, activation, inputs, dtype and device of the old one.

    Raises:
        TransferError: no linear layer of that name.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n}
    wanted = next(reversed(linear), "") if name is None else name
    if wanted not in linear:
        names = ", ".join(linear) or "none"
        raise TransferError(f"expected a linear layer {wanted!r}; the model has: {names}")
    old = linear[wanted]
    arguments = old.in_features, classes, old.bias is not None, old.weight.device, old.weight.dtype
    if isinstance(old, fastmp.nn.Linear):
        new: nn.Linear = fastmp.nn.Linear(*arguments, activation=old.activation)
    else:
        new = nn.Linear(*arguments)
    model.set_submodule(wanted, new)
    return new


# ---- layers ----


def layers(model: nn.Module) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """The model's layers with their named parameters, from the input to the head.

    A layer is a child of the model with parameters; of an ``nn.Sequential`` or ``nn.ModuleList``
    the children are layers, of a compiled or data-parallel model those of the model itself.
    Parameters of the model itself belong to the first layer, shared ones to the last that has them.
    """
    leaves = [(name, list(module.parameters())) for name, module in _leaves(model, "")]
    owner = {p: i for i, (_, params) in enumerate(leaves) for p in params}
    names = {p: name for name, p in model.named_parameters()}
    found = [
        (layer, [(names[p], p) for p in params if owner[p] == i])
        for i, (layer, params) in enumerate(leaves)
    ]
    found = [(layer, named) for layer, named in found if named]
    loose = [(name, p) for p, name in names.items() if p not in owner]
    if loose and found:
        found[0][1].extend(loose)
    return found or [("", loose)]


def _leaves(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    children = list(module.named_children())
    wraps = len(children) == 1 and children[0][0] in WRAPPERS
    for name, child in children:
        if wraps or isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _leaves(child, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def layerwise_lr(
    model: nn.Module, lr: float, decay: float = 0.7, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate for each layer (Howard and Ruder 2018, 1801.06146).

    The last layer has ``lr``, each layer before it ``decay`` times the rate of the layer after it.
    Schedules multiply by the group's ``lr_scale``. Frozen parameters are left out.

    Args:
        model: see ``layers``.
        lr: of the last layer.
        decay: in (0, 1]; with 1 all layers have the same rate and share their groups.
        weight_decay: of matrices and filters; norms and biases have none.

    Raises:
        ValueError: a decay outside (0, 1].
        TransferError: all parameters are frozen.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1], got {decay}")
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    found = layers(model)
    for i, (_, named) in enumerate(found):
        depth = len(found) - 1 - i
        for name, p in named:
            if p.requires_grad:
                groups.setdefault((decay**depth, p.ndim >= 2), []).append((name, p))
    if not groups:
        raise TransferError("expected a trainable parameter, got a model with all of them frozen")
    return [
        {
            "params": params,
            "lr": lr * scale,
            "lr_scale": scale,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (scale, decays), params in groups.items()
    ]


def freeze(model: nn.Module, *patterns: str) -> list[str]:
    """Set ``requires_grad=False`` on parameters of a model.

    Batch norms with frozen parameters also keep their running statistics under ``train_mode``,
    which the trainer uses.

    Args:
        model: any.
        patterns: names of parameters or modules, or globs such as "blocks.*".

    Returns:
        the names of the parameters that are newly frozen.

    Raises:
        TransferError: a pattern without a match.
    """
    return _set_trainable(model, patterns, False)


def unfreeze(model: nn.Module, *patterns: str) -> list[str]:
    """Set ``requires_grad=True``; ``model``, ``patterns`` and result as in ``freeze``."""
    return _set_trainable(model, patterns, True)


def _set_trainable(model: nn.Module, patterns: Iterable[str], trains: bool) -> list[str]:
    named = dict(model.named_parameters())
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matches = [n for n in named if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not matches:
            tops = dict.fromkeys(name.rpartition(".")[0] or name for name in named)
            raise TransferError(
                f"no parameter matches {pattern!r}; the model has {', '.join(list(tops)[:20])}"
            )
        chosen.update(dict.fromkeys(matches))
    changed = [name for name in chosen if named[name].requires_grad != trains]
    for name in changed:
        named[name].requires_grad_(trains)
    return changed


def train_mode(model: nn.Module) -> None:
    """``model.train()``, but batch norms whose parameters are frozen keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):
                module.eval()


@dataclass(frozen=True)
class GradualUnfreezing:
    """Train the last layer alone, and one more layer before it after each ``every`` epochs.

    Howard and Ruder 2018 (arXiv:1801.06146). A function of the epoch, without state to save.

    Raises:
        ValueError: ``every`` below 1 epoch.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {self.every}")

    def plan(self, model: nn.Module, epoch: int) -> bool:
        """Freeze and unfreeze the layers for ``epoch``, from 0; whether any parameter changed."""
        last = 1 + epoch // self.every
        changed = False
        for depth, (_, named) in enumerate(reversed(layers(model))):
            for _, p in named:
                trains = depth < last
                changed |= p.requires_grad != trains
                p.requires_grad_(trains)
        return changed
