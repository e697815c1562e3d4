"""What a recorded step holds besides its inputs: compared before every replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastmp.optim.base import FusedOptimizer


class Identities:
    """Objects, equal to others if they are the same ones; keeps them, so that no id is reused."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, objects: Sequence[Any]) -> None:
        self._objects = objects

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Identities)
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )


class GraphConstants:
    """Hyperparameters, flags and addresses of the objects that a step uses.

    Args:
        optimizers: their hyperparameters, parameters, state.
        modules: their training flags, weights and buffers, hooks excluded.
        scalers: the constants of their rule.
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        modules: Iterable[nn.Module] = (),
        scalers: Iterable[torch.amp.GradScaler] = (),
    ) -> None:
        self.optimizers, self.scalers = list(optimizers), list(scalers)
        self.modules = list(dict.fromkeys(chain.from_iterable(m.modules() for m in modules)))

    def _params(self) -> list[Tensor]:
        groups = chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers)
        return list(chain.from_iterable(group["params"] for group in groups))

    def stable(self) -> Any:
        """Everything that a step must leave as it is, comparable."""
        params = self._params()
        states = chain.from_iterable(map(_states_of, self.optimizers))
        values: list[Any] = []
        for module in self.modules:
            values += module._parameters.values()
            values += module._buffers.values()
            values += module._modules.values()
        return (
            [_of_optimizer(optimizer) for optimizer in self.optimizers],
            [(p.data_ptr(), p.requires_grad) for p in params],
            Identities(params),
            Identities(list(chain.from_iterable(map(dict.values, states)))),
            [m.training for m in self.modules],
            Identities(values),
            [_of_scaler(scaler) for scaler in self.scalers],
        )

    def versions(self) -> Any:
        """Of the weights: one that was written has another, and its master follows in a step that
        runs as kernels."""
        return [p._version for p in self._params()]

    def restore_point(self) -> Callable[[], None]:
        """Call the result to undo what a step that was captured in vain left on the host."""
        grads = [(p, p.grad) for p in self._params()]
        states = [copy.copy(scaler._per_optimizer_states) for scaler in self._enabled_scalers()]

        def restore() -> None:
            for param, grad in grads:
                param.grad = grad
            for scaler, state in zip(self._enabled_scalers(), states, strict=True):
                scaler._per_optimizer_states = state

        return restore

    def _enabled_scalers(self) -> list[torch.amp.GradScaler]:
        return [scaler for scaler in self.scalers if scaler.is_enabled()]

    def without_grad(self) -> Hashable:
        """Which parameters have no gradient."""
        return tuple([p.grad is None for p in self._params()])


def _states_of(optimizer: torch.optim.Optimizer) -> Iterable[dict[str, Any]]:
    # a look at ``state`` makes a fused optimizer compare all of it in its next step
    own = optimizer._own_state if isinstance(optimizer, FusedOptimizer) else optimizer.state
    return own.values()


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.launch_constants()
    return [
        {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def _of_scaler(scaler: torch.amp.GradScaler) -> Any:
    if not scaler.is_enabled():
        return False
    factors = scaler.get_growth_factor(), scaler.get_backoff_factor()
    return *factors, scaler.get_growth_interval(), Identities([scaler._scale])
