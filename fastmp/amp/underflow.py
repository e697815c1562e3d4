"""What 16 bits cost a step: gradients that became zero, updates that changed nothing.

Asked for, not always on: it reads gradients once more and keeps a copy of weights and masters
during the step, 4 bytes a parameter (8 in fp64) and about 30 of traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.optim.base import Fused
from fastmp.optim.state import master_of

NAMES = ("gradients", "gradients_zero", "gradients_subnormal", "updates_lost", "updates_saved")


class Telemetry:
    """Counts elements, on the device, over all parameters that have a gradient:

    - ``gradients``: elements of gradients;
    - ``gradients_zero``: of them exactly zero. What was flushed to zero is among them, together
      with what was zero from the start (behind a ReLU, say): watch it against the loss scale;
    - ``gradients_subnormal``: below the dtype's smallest normal number, 6.1e-5 in fp16, where bits
      are lost one by one;
    - ``updates_lost``: gradient not zero, and yet the weight as the optimizer keeps it, in fp32
      (the master of 16-bit weights), did not change;
    - ``updates_saved``: that one changed, its 16-bit weight did not. Without masters these updates
      would be lost.

    A skipped step loses no updates.
    """

    def __init__(self, optimizer: Fused) -> None:
        self._optimizer = optimizer
        self._before: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def before(self) -> None:
        """Look at the gradients, and keep the weights; to be called before the step."""
        params = [p for g in self._optimizer.param_groups for p in g["params"]]
        params = [p for p in params if p.grad is not None]
        self._before = []
        zero, subnormal, total = [], [], 0
        for p in params:
            grad = p.grad
            moves = grad != 0
            zero.append((~moves).sum())
            subnormal.append((moves & (grad.abs() < torch.finfo(grad.dtype).tiny)).sum())
            total += grad.numel()
            kept = master_of(p, self._optimizer.state.get(p, {})).clone()
            self._before.append((p, moves, p.detach().clone(), kept))
        if params:
            counts = torch.stack(zero).sum(), torch.stack(subnormal).sum()
            self._counts = [torch.full_like(counts[0], total), *counts]

    @torch.no_grad()
    def after(self) -> dict[str, Tensor]:
        """The counts, 0-d int64; to be called after the step, before the gradients go."""
        if not self._before:
            return {}
        lost, saved = [], []
        for p, moves, weight, kept in self._before:
            same = master_of(p, self._optimizer.state.get(p, {})) == kept
            lost.append((moves & same).sum())
            saved.append((~same & (p == weight)).sum())
        applied = 1 - self._optimizer.found_inf.long()
        self._before = []
        updates = (torch.stack(part).sum() * applied for part in (lost, saved))
        return dict(zip(NAMES, (*self._counts, *updates), strict=True))
