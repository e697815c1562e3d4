"""Transfer learning: weights from elsewhere, a new head, frozen layers, a rate for each layer.

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

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_SHOWN = 4  # names of a kind in a report


class TransferError(ValueError):
    """Weights that cannot be read or do not fit, or names that lead to nothing."""


# ---- weights ----


@dataclass(frozen=True)
class Report:
    """What ``load_pretrained`` did with each entry.

    ``loaded`` ones are the source's now. ``reshaped`` ones have another shape in the source,
    (wanted, found): the model keeps its own, as it does those that are ``missing`` there.
    ``unexpected`` ones the model has no use for.
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
        model: whatever does not fit stays as it is there.
        source: a .safetensors file; a file of ``torch.save`` with a state_dict, bare or under
            "state_dict" or "model" (read with weights_only: nothing in it is executed); the folder
            of a fastmp checkpoint; a module; a state_dict.
        prefix: in front of the model's names in the source, such as "backbone.".
        strict: refuse a source that does not fit entry by entry.

    Raises:
        TransferError: the source cannot be read, nothing in it fits, or with ``strict`` not
            everything. The model has not changed.
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
    if not fitting:
        raise TransferError(
            f"nothing in the source fits the model: it has {', '.join(list(entries)[:_SHOWN])}, "
            f"the model wants {', '.join(list(own)[:_SHOWN])}; is there a prefix?"
        )
    if strict and len(fitting) < max(len(own), len(entries)):
        raise TransferError(f"expected every entry to fit, got: {report}")
    for name in fitting:
        own[name].copy_(entries[name])
    return report


def _entries(source: Any) -> dict[str, Tensor]:
    """The tensors of a source, by name."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source))
    for key in ("state_dict", "model"):
        if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
            source = source[key]
    tensors = {}
    if isinstance(source, Mapping):
        tensors = {str(name): v for name, v in source.items() if isinstance(v, Tensor)}
    if not tensors:
        raise TransferError(
            "expected a file, a checkpoint, a module or a state_dict with tensors, "
            f"got {type(source).__name__} without any"
        )
    return tensors


def _read(path: Path) -> Any:
    if not path.exists():
        raise TransferError(f"there is no {path}; expected a file of weights or a checkpoint")
    try:
        if path.is_dir():
            return checkpoint.load(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, checkpoint.CheckpointError) as error:
        raise TransferError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises what unpickling raises: anything
        raise TransferError(
            f"{path} cannot be read: expected .safetensors or a state_dict of torch.save without "
            f"other objects, got: {str(error).splitlines()[0]}"
        ) from error


def _unwrapped(entries: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in entries):
            entries = {name.removeprefix(wrapper): value for name, value in entries.items()}
    return {n.removeprefix(prefix): value for n, value in entries.items() if n.startswith(prefix)}


def replace_head(model: nn.Module, classes: int, name: str | None = None) -> nn.Module:
    """Give the model a new last linear layer, for ``classes`` classes, with fresh weights.

    Args:
        model: changed in place; make the optimizer afterwards.
        classes: outputs of the new layer.
        name: of the layer, where it is not the last ``nn.Linear`` of the model.

    Returns:
        the new layer: of the old one's kind, inputs, dtype and device.

    Raises:
        TransferError: there is no such linear layer.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n}
    wanted = next(reversed(linear), "") if name is None else name
    if wanted not in linear:
        known = ", ".join(linear) or "none"
        raise TransferError(f"expected a linear layer {wanted!r}; the model's are: {known}")
    old = linear[wanted]
    kind = fastmp.nn.Linear if isinstance(old, fastmp.nn.Linear) else nn.Linear
    weight = old.weight
    new = kind(old.in_features, classes, old.bias is not None, weight.device, weight.dtype)
    model.set_submodule(wanted, new)
    return new


# ---- layers ----


def layers(model: nn.Module) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """The model's layers with their named parameters, from the input to the head.

    A layer is a child of the model that has parameters; an ``nn.Sequential`` or ``nn.ModuleList``
    is not one but its children are. Parameters of the model's own belong to the first.
    """
    found = [(name, list(module.named_parameters(name))) for name, module in _leaves(model, "")]
    known = {p for _, named in found for _, p in named}
    loose = [(name, p) for name, p in model.named_parameters() if p not in known]
    if loose and found:
        found[0][1].extend(loose)
    return found or [("", loose)]


def _leaves(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _leaves(child, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def layerwise_lr(
    model: nn.Module, lr: float, decay: float = 0.7, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate for each layer (Howard and Ruder 2018, 1801.06146).

    The last layer has ``lr``, each one before it ``decay`` times that of the one after. Schedules
    multiply it in (``lr_scale``). Frozen parameters are left out.

    Args:
        model: see ``layers``.
        lr: of the last layer.
        decay: in (0, 1]; with 1 all layers have the same rate and share their groups.
        weight_decay: of matrices and filters; norms and biases have none, for there is no reason
            for them to be near zero.

    Raises:
        ValueError: a decay outside (0, 1].
        TransferError: nothing trains.
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
        raise TransferError("expected a parameter that trains, all are frozen; unfreeze some")
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
    """Let parameters of a model keep their values.

    Args:
        model: any.
        patterns: names, names of modules, or such as "blocks.*".

    Their running statistics stay too where ``train_mode`` is used, as the trainer does.

    Returns:
        the names of the parameters that no longer train.

    Raises:
        TransferError: a pattern that fits nothing.
    """
    return _set_trainable(model, patterns, False)


def unfreeze(model: nn.Module, *patterns: str) -> list[str]:
    """Let parameters train again; ``model`` and ``patterns`` as in ``freeze``."""
    return _set_trainable(model, patterns, True)


def _set_trainable(model: nn.Module, patterns: Iterable[str], trains: bool) -> list[str]:
    named = dict(model.named_parameters())
    chosen: dict[str, None] = {}
    for pattern in patterns:
        fits = [n for n in named if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not fits:
            tops = dict.fromkeys(name.rpartition(".")[0] or name for name in named)
            raise TransferError(
                f"no parameter fits {pattern!r}; the model has {', '.join(list(tops)[:20])}"
            )
        chosen.update(dict.fromkeys(fits))
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
    """Train the last layer alone, and after every so many epochs one more before it.

    Howard and Ruder 2018 (arXiv:1801.06146). The epoch alone decides, so a run that is resumed
    needs nothing to be saved.

    Raises:
        ValueError: ``every`` below 1 epoch.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {self.every}")

    def plan(self, model: nn.Module, epoch: int) -> bool:
        """Freeze and unfreeze as ``epoch``, from 0, wants it; whether anything changed."""
        last = 1 + epoch // self.every
        changed = False
        for depth, (_, named) in enumerate(reversed(layers(model))):
            for _, p in named:
                trains = depth < last
                changed |= p.requires_grad != trains
                p.requires_grad_(trains)
        return changed
