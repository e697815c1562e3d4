"""The state of ``Muon`` as the states of torch's two optimizers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

State = dict[str, Any]


def split(state: Mapping[str, Any]) -> tuple[State, State]:
    """A ``state_dict`` of ``Muon`` as those of ``torch.optim.Muon`` and ``torch.optim.AdamW``.

    Each has the groups of its rule in their order; its parameters are counted from 0, as in an
    optimizer that was made of these groups.
    """
    found: dict[str, State] = {name: {"state": {}, "param_groups": []} for name in _RULES}
    for group in state["param_groups"]:
        of = found[group.get("rule", "muon")]
        first = sum(len(other["params"]) for other in of["param_groups"])
        for i, index in enumerate(group["params"], first):
            if index in state["state"]:
                of["state"][i] = state["state"][index]
        of["param_groups"].append({**group, "params": list(range(first, first + _size(group)))})
    return found["muon"], found["adamw"]


def join(own: Mapping[str, Any], muon: Mapping[str, Any], adamw: Mapping[str, Any]) -> State:
    """The inverse of ``split``, in the groups of ``own``, a ``state_dict`` of ``Muon``.

    Raises:
        ValueError: other numbers of groups, or of parameters in a group.
    """
    sources = {"muon": muon, "adamw": adamw}
    waiting = {name: list(source["param_groups"]) for name, source in sources.items()}
    joined: State = {"state": {}, "param_groups": []}
    for group in own["param_groups"]:
        name = group.get("rule", "muon")
        theirs = waiting[name].pop(0) if waiting[name] else None
        if theirs is None or _size(theirs) != _size(group):
            raise ValueError(
                f"expected a group of {_size(group)} parameters in the state of torch's {name}, "
                f"got {'none' if theirs is None else _size(theirs)}"
            )
        for index, other in zip(group["params"], theirs["params"], strict=True):
            if other in sources[name]["state"]:
                joined["state"][index] = sources[name]["state"][other]
        known = {key: value for key, value in theirs.items() if key in group and key != "params"}
        joined["param_groups"].append({**group, **known})
    left = [name for name, groups in waiting.items() if groups]
    if left:
        raise ValueError(f"the state of torch's {left[0]} has more groups than this optimizer")
    return joined


_RULES = ("muon", "adamw")


def _size(group: Mapping[str, Any]) -> int:
    return len(group["params"])
