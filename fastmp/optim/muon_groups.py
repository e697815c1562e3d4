"""Which parameters of a model go to Muon, and which to AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HEADS = ("head", "heads", "classifier", "lm_head", "score")  # first part of a name
#: Names of the model in DistributedDataParallel or DataParallel, and in a compiled one.
WRAPPERS = ("module", "_orig_mod")
_NO_MATRICES = ("embed", "bias", "token", "position")  # in the name of a parameter of no layer


def muon_groups(
    model: nn.Module,
    *,
    adamw: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, as parameter groups for ``Muon``.

    To Muon (Jordan et al. 2024): the matrices of linear layers and attention, the kernels of
    convolutions without groups. To AdamW: embeddings, the head (the last layer, or one named head,
    heads, classifier, lm_head or score, and weights tied to an embedding), kernels of grouped
    convolutions, whose rows act on different inputs, and, without weight decay, norms, biases and
    other vectors.

    Args:
        model: its parameters by name; shared ones count once.
        adamw: options of the AdamW groups: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        exclude: patterns of names (``fnmatch``) that go to AdamW besides.
        groups: of (name, parameter) pairs, as from ``transfer.layerwise_lr``: each is split in two
            that keep its options. None: all trainable parameters; AdamW's vectors have no decay.

    Returns:
        Groups, none of them empty; by default Muon's, AdamW's matrices, AdamW's vectors.

    Raises:
        ValueError: a pattern that no parameter's name fits, or ``groups`` of another model.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"exclude: no trainable parameter's name fits {pattern!r}")
    embeddings = _embeddings(model)
    candidates = [(n, p) for n, p in named if _is_matrix(model, n, p) and p not in embeddings]
    head = _head(model, candidates)
    matrices = {
        _own_name(name)
        for name, p in candidates
        if p is not head
        and _own_name(name).split(".")[0] not in _HEADS
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if groups is None:
        vectors = [(name, p) for name, p in named if p.ndim < 2]
        others = [(name, p) for name, p in named if p.ndim >= 2]
        groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    known = {_own_name(name) for name, _ in named}
    found: list[dict[str, Any]] = []
    for group in groups:
        for name, _ in group["params"]:
            if _own_name(name) not in known:
                raise ValueError(f"groups: the model has no trainable parameter {name!r}")
        own = [(name, p) for name, p in group["params"] if _own_name(name) in matrices]
        rest = [(name, p) for name, p in group["params"] if _own_name(name) not in matrices]
        found.append({**group, "params": own, "rule": "muon"})
        found.append({**(adamw or {}), **group, "params": rest, "rule": "adamw"})
    return [group for group in found if group["params"]]


def _embeddings(model: nn.Module) -> set[Tensor]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {m.weight for m in model.modules() if isinstance(m, kinds)}


def _own_name(name: str) -> str:
    """The name of a parameter in the model that is wrapped."""
    first, _, rest = name.partition(".")
    return _own_name(rest) if rest and first in WRAPPERS else name


def _layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_matrix(model: nn.Module, name: str, param: Tensor) -> bool:
    layer = _layer(model, name)
    if isinstance(layer, _CONVOLUTIONS):
        return param.ndim > 2 and layer.groups == 1
    own = name.rpartition(".")[2]
    is_layer = own.endswith("weight")
    return param.ndim == 2 and (is_layer or not any(word in name for word in _NO_MATRICES))


def _head(model: nn.Module, candidates: Sequence[tuple[str, Tensor]]) -> Tensor | None:
    """The weight of the last linear layer, unless the head is another one.

    One of ``_HEADS``, one tied to an embedding, or none: a convolution comes last.
    """
    tied = _embeddings(model)
    linears = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    known = any(_own_name(name).split(".")[0] in _HEADS for name, _ in candidates)
    if len(candidates) < 2 or known or any(weight in tied for weight in linears):
        return None
    name, param = candidates[-1]
    return None if isinstance(_layer(model, name), _CONVOLUTIONS) else param
