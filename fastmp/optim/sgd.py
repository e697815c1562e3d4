"""SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastmp.backends.abi import Hyperparameters
from fastmp.ops.update.rules import rule
from fastmp.optim.averages import Ema
from fastmp.optim.base import FusedOptimizer


class SGD(FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with fp32 masters and a fused step (Sutskever et al. 2013).

        optimizer = fastmp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    What to read after a step: see ``AdamW``.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr: learning rate, a number or a tensor; schedules and torch's schedulers change it.
        momentum: how much of the average of the gradients a step keeps; 0: no average, and no
            state but the master.
        dampening: share of the gradient that does not enter the average.
        weight_decay: times the weight, added to the gradient.
        nesterov: step along the gradient and the average as it will be.
        maximize: ascend instead of descend.
        foreach, fused: accepted as in torch; the step is always fused.
        differentiable: False; True is refused.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does, above 0; None: do not clip.
        skip_nonfinite: False: without a scaler and without clipping no scan of the gradients, 20
            bytes a parameter instead of 24 for fp32 weights with momentum; non-finite values then
            reach the weights, as in torch.
        ema, state_dtype, master: as in ``Adam``.

    Raises:
        ValueError: as torch, a ``max_grad_norm`` that is not above 0, a decay outside [0, 1), an
            unknown ``state_dtype`` or ``master``, ``differentiable=True``, or a sparse, complex or
            integer parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema=ema,
            state_dtype=state_dtype,
            master=master,
        )

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
