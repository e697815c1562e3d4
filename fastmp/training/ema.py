"""The exponential moving average (EMA) of a model's weights, in fp32.

    average += (1 - decay) (weight - average)        after every applied step

An optimizer of ``fastmp.optim`` moves the averages of its parameters in its own pass: 8 bytes a
parameter instead of 18 and two launches a tensor. What it does not have, running statistics of
batch norms and parameters of other optimizers, is averaged here. A 16-bit average would stand
still: with decay 0.999 each change is below half a unit in the last place of bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmp.distributed.fsdp import Shards
from fastmp.optim.averages import AveragedOptimizer


class EMA:
    """The average of ``model``'s floating-point parameters and buffers; 4 bytes each.

    Args:
        model: its parameters and buffers must stay the same tensors.
        decay: in [0, 1).
        optimizer: one of ``fastmp.optim``, which then averages its parameters; None, or another:
            all is averaged here.
        shards: of the model, where it is split: a rank has the averages of its own.

    Raises:
        ValueError: a decay outside [0, 1), or another one than the optimizer's.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        optimizer: torch.optim.Optimizer | None = None,
        shards: Shards | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average must lie in [0, 1), got {decay}")
        self.decay = decay
        self._optimizer = optimizer if isinstance(optimizer, AveragedOptimizer) else None
        if self._optimizer is not None:
            if self._optimizer.ema not in (None, decay):
                raise ValueError(
                    f"the decay of the average is {decay} here and {self._optimizer.ema} in the "
                    "optimizer: expected the same, or one of them left out"
                )
            self._optimizer.ema = decay
        self._shards = shards
        state = model.state_dict(keep_vars=True) if shards is None else shards.state_tensors()
        self._weights = {n: value for n, value in state.items() if value.is_floating_point()}
        groups = () if self._optimizer is None else self._optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        positions = {param: i for i, param in enumerate(params)}
        self._moved = {n: positions[w] for n, w in self._weights.items() if w in positions}
        self._own = {
            name: weight.detach().float().clone()
            for name, weight in self._weights.items()
            if name not in self._moved
        }

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Move the averages towards the weights, unless the optimizer's last step was skipped.

        Args:
            found_inf: 0-d, 1 if that step was skipped, else 0; it is read on the device.
        """
        step = (1.0 - self.decay) * (1.0 - found_inf)
        for name, average in self._own.items():
            average.lerp_(self._weights[name].float(), step)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the weights: a loaded run that had no average begins one."""
        for name, average in self._own.items():
            average.copy_(self._weights[name])
        if self._optimizer is not None:  # averages that are new begin at the masters
            self._optimizer.ema = None
            self._optimizer.ema = self.decay

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """In the block the model has the averages; afterwards its own weights, to the bit."""
        own = {name: self._weights[name].detach().clone() for name in self._own}
        with nullcontext() if self._optimizer is None else self._optimizer.averaged():
            self._write(self._own)
            self._reshard()
            try:
                yield
            finally:
                self._write(own)
                self._reshard()

    def _reshard(self) -> None:
        """The next forward of a split model reads the shards, which have just been written."""
        if self._shards is not None:
            self._shards.reshard()

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            # .data: a write that raised the version would drop the remainders of bf16 weights
            self._weights[name].data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages, by the model's names, fp32; full tensors, so every rank must call it."""
        averages = [] if self._optimizer is None else self._optimizer.averages()
        values = {
            name: averages[self._moved[name]] if name in self._moved else self._own[name]
            for name in self._weights
        }
        return values if self._shards is None else self._shards.full_tensors(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: other names than the model has.
        """
        if state_dict.keys() != self._weights.keys():
            differing = sorted(state_dict.keys() ^ self._weights.keys())
            raise ValueError(
                f"the averages are those of another model: {', '.join(differing[:5])} "
                f"{'is' if len(differing) == 1 else 'are'} only on one side"
            )
        self._load(state_dict if self._shards is None else self._shards.own_parts(state_dict))

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, average in self._own.items():
            average.copy_(values[name])
        if self._optimizer is not None:
            averages = self._optimizer.averages()
            for name, i in self._moved.items():
                averages[i] = values[name]
            self._optimizer.load_averages(averages)
