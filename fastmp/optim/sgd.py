"""SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmp.backends.abi import Hyperparameters
from fastmp.ops.update.rules import rule
from fastmp.optim.base import FusedOptimizer


class SGD(FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with fp32 masters and a fused step.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does; None: do not clip.
        skip_nonfinite: False: without a scaler and without clipping no scan of the gradients, 28
            bytes a parameter instead of 32 for fp32 weights; non-finite values then reach the
            weights, as in torch.

    Raises:
        ValueError: as torch, or a negative ``max_grad_norm``, ``differentiable=True``, or a
            sparse, complex or integer parameter.
    """

    @rule(2)
    @rule(3)  # with momentum
    @staticmethod
    def _rule(
        p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyperparameters
    ) -> Tensor:
        g = g + h.weight_decay * p
        if states:
            buffer = states[0]
            if step == 1:
                buffer.copy_(g)
            else:
                buffer.mul_(h.beta1).add_(g, alpha=1 - h.dampening)
            g = g + h.beta1 * buffer if h.nesterov else buffer
        return p - h.lr * g

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        return Hyperparameters(
            rule=3 if group["momentum"] != 0 else 2,
            lr=self._lr(group),
            beta1=group["momentum"],
            weight_decay=float(group["weight_decay"]),
            dampening=group["dampening"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
        )
