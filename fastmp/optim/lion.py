"""Lion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmp.backends.abi import Hyperparameters
from fastmp.ops.update.rules import rule
from fastmp.optim.averages import Ema
from fastmp.optim.base import FusedOptimizer


class Lion(FusedOptimizer):
    """Lion with fp32 masters and a fused step (Chen et al. 2023, arXiv:2302.06675).

        optimizer = fastmp.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)

    The sign of an average of the gradients, and half of Adam's state. What to read after a step:
    see ``AdamW``. The paper advises a third to a tenth of AdamW's ``lr`` and three to ten times its
    ``weight_decay``. torch has no Lion; the arguments are those of the paper's own code.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr: learning rate, at least 0.
        betas: how much of the average the step and the average itself keep, in [0, 1).
        weight_decay: decoupled, as in AdamW, at least 0.
        maximize: ascend instead of descend.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does, above 0; None: do not clip.
        skip_nonfinite, ema, state_dtype, master: as in ``Adam``.

    Raises:
        ValueError: a negative ``lr`` or ``weight_decay``, a beta outside [0, 1), a
            ``max_grad_norm`` that is not above 0, a decay outside [0, 1), an unknown
            ``state_dtype`` or ``master``, or a sparse, complex or integer parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            options,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema=ema,
            state_dtype=state_dtype,
            master=master,
        )

    @rule(4)
    @staticmethod
    def _rule(
        p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyperparameters
    ) -> Tensor:
        (m,) = states
        direction = (m * h.beta1 + g * (1 - h.beta1)).sign()
        m.mul_(h.beta2).add_(g, alpha=1 - h.beta2)
        return p * (1 - h.lr * h.weight_decay) - h.lr * direction

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        beta1, beta2 = group["betas"]
        return Hyperparameters(
            rule=4,
            lr=self._lr(group),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
