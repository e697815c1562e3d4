"""What 16 bits cost a step: gradients flushed to zero, updates that changed no weight.

Off by default: it reads the gradients once more and keeps a copy of weights and masters during
the step, 4 bytes a parameter (8 in fp64) and about 30 of traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.optim.base import FusedOptimizer
from fastmp.optim.state import master_of

NAMES = ("gradients", "gradients_zero", "gradients_subnormal", "updates_lost", "updates_saved")


class Telemetry:
    """Counts elements, on the device, over all parameters that have a gradient:

    - ``gradients``: elements of gradients;
    - ``gradients_zero``: of them exactly zero, flushed to zero or zero from the start (behind a
      ReLU, say): watch it against the loss scale;
    - ``gradients_subnormal``: below the dtype's smallest normal number, 6.1e-5 in fp16, where bits
      are lost one by one;
    - ``updates_lost``: gradient not zero, fp32 weight (the master of a 16-bit weight) unchanged;
    - ``updates_saved``: fp32 master changed, 16-bit weight unchanged. Without masters these
      updates would be lost.

    A skipped step loses no updates.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._before: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._counts: list[Tensor] = []

    def _master(self, param: Tensor) -> Tensor:
        return master_of(param, self._optimizer.state.get(param, {}))

    @torch.no_grad()
    def before(self) -> None:
        """Count the gradients and copy the weights; call it before the step."""
        zero, subnormal, total = [], [], 0
        self._before = []
        for p in (p for group in self._optimizer.param_groups for p in group["params"]):
            if p.grad is None:
                continue
            nonzero = p.grad != 0
            zero.append((~nonzero).sum())
            subnormal.append((nonzero & (p.grad.abs() < torch.finfo(p.grad.dtype).tiny)).sum())
            total += p.grad.numel()
            self._before.append((p, nonzero, p.detach().clone(), self._master(p).clone()))
        if zero:
            counts = torch.stack(zero).sum(), torch.stack(subnormal).sum()
            self._counts = [torch.full_like(counts[0], total), *counts]

    @torch.no_grad()
    def after(self) -> dict[str, Tensor]:
        """The counts, 0-d int64; call it after the step, before the gradients are freed."""
        if not self._before:
            return {}
        lost, saved = [], []
        for p, nonzero, weight, master in self._before:
            same = self._master(p) == master
            lost.append((nonzero & same).sum())
            saved.append((~same & (p == weight)).sum())
        applied = 1 - self._optimizer.found_inf.long()
        self._before = []
        updates = (torch.stack(part).sum() * applied for part in (lost, saved))
        return dict(zip(NAMES, (*self._counts, *updates), strict=True))
