"""Whether the tensors of an optimizer's state are still the ones that its table points to.

A user may replace any of them between two steps. To compare 500 objects takes 20 µs, a quarter of
the host time of a step of 161 tensors, so it is done from the first time on that the state was used
from outside: a training loop does not use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain, starmap, zip_longest
from operator import is_
from typing import Any

import torch
from torch import Tensor


class WatchedState(torch.optim.Optimizer):
    """An optimizer that knows whether its state was used from outside."""

    _state_is_shared = False

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch, by parameter. The caller may keep its dicts."""
        self._state_is_shared = True
        return self._own_state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._state_is_shared = True
        self.__dict__["state"] = value

    @property
    def _own_state(self) -> defaultdict[Tensor, Any]:
        own: defaultdict[Tensor, Any] = self.__dict__["state"]
        return own


class HeldState:
    """The objects in an optimizer's state: a user may replace any of them between two steps."""

    def __init__(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        self._states = states
        self._dicts = list(states.values())
        self._values = [own.values() for own in self._dicts]  # views: they show what is there now
        self._tensors = list(chain.from_iterable(self._values))

    def is_unchanged(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the objects are those of ``states`` now."""
        return (
            states is self._states
            and _are_the_same(states.values(), self._dicts)
            and _are_the_same(chain.from_iterable(self._values), self._tensors)
        )


_END = object()


def _are_the_same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(starmap(is_, zip_longest(now, before, fillvalue=_END)))
