"""The exponential moving average (EMA) of a model's weights, in fp32.

    average += (1 - decay) (weight - average)        after every applied step

A 16-bit average would stand still: with decay 0.999 each change is below half a unit in the last
place of bf16. Running statistics of batch norms are averaged too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """The average of ``model``'s floating-point parameters and buffers; 4 bytes each.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average must lie in [0, 1), got {decay}")
        self.decay = decay
        self._weights = {
            name: value
            for name, value in model.state_dict(keep_vars=True).items()
            if value.is_floating_point()
        }
        self._averages = {
            name: value.detach().float().clone() for name, value in self._weights.items()
        }

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Move the averages towards the weights, unless the optimizer's last step was skipped.

        Args:
            found_inf: 0-d, 1 if that step was skipped, else 0; it is read on the device.
        """
        step = (1.0 - self.decay) * (1.0 - found_inf)
        for name, average in self._averages.items():
            average.lerp_(self._weights[name].float(), step)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the weights: a loaded run that had no average begins one."""
        for name, average in self._averages.items():
            average.copy_(self._weights[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """In the block the model has the averages; afterwards its own weights, to the bit."""
        own = {name: value.detach().clone() for name, value in self._weights.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            # .data: a write that raised the version would drop the remainders of bf16 weights
            self._weights[name].data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages, by the model's names, fp32."""
        return dict(self._averages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: other names than the model has.
        """
        if state_dict.keys() != self._averages.keys():
            differing = sorted(state_dict.keys() ^ self._averages.keys())
            raise ValueError(
                f"the averages are those of another model: {', '.join(differing[:5])} "
                f"{'is' if len(differing) == 1 else 'are'} only on one side"
            )
        for name, value in state_dict.items():
            self._averages[name].copy_(value)
