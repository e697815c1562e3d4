"""Drop-in optimizers: torch's arguments and state, one fused call for the whole step.

    optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

Parameters may be fp16 or bf16: each then has an fp32 master, kept in the optimizer's state beside
the moments, which are fp32 whatever the parameter is. Every step unscales, looks for non-finite
gradients, takes the global norm, clips, updates and rounds back in one call; if any gradient is not
finite, nothing changes but the count of skipped steps.

Differences from torch, each on purpose:

- a non-finite gradient skips the step, with or without a GradScaler (``skip_nonfinite``);
- gradients are left as they came: torch's fused step leaves them unscaled, one more write;
- ``differentiable=True`` is refused; ``foreach``, ``fused`` and ``capturable`` are accepted and
  have no effect: there is one implementation;
- fp16 weights changed through ``.data`` behind autograd's back are not noticed (any other in-place
  change is, and reaches the master): use ``with torch.no_grad()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.backends.table import Rule
from fastmp.fused import Fused
from fastmp.ops.update import Hyper

__all__ = ["SGD", "Adam", "AdamW"]


class Adam(Fused, torch.optim.Adam):
    """``torch.optim.Adam`` with fp32 masters and a fused step (Kingma & Ba, 2015).

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in torch.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does; None: do not clip.
        skip_nonfinite: False trusts the gradients as torch does: without a scaler and without
            clipping they are then not looked at before they are used, 28 bytes a parameter instead
            of 32 for fp32 weights, and one that is not finite goes into the weights.

    Raises:
        ValueError: what torch refuses, a negative ``max_grad_norm``, ``differentiable=True``, or a
            sparse, complex or integer parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        self._init_fused(max_grad_norm, skip_nonfinite)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keys = ("exp_avg", "exp_avg_sq")
        return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(
            rule=Rule.AMSGRAD if group["amsgrad"] else Rule.ADAM,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            decoupled=group["decoupled_weight_decay"],
        )


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` with fp32 masters and a fused step (Loshchilov & Hutter, 2019).

    Arguments and errors are those of ``Adam``, but for ``decoupled_weight_decay``, which is on.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        self._init_fused(max_grad_norm, skip_nonfinite)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class SGD(Fused, torch.optim.SGD):
    """``torch.optim.SGD`` with fp32 masters and a fused step.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does; None: do not clip.
        skip_nonfinite: False trusts the gradients as torch does: without a scaler and without
            clipping they are then not looked at before they are used, 28 bytes a parameter instead
            of 32 for fp32 weights, and one that is not finite goes into the weights.

    Raises:
        ValueError: what torch refuses, a negative ``max_grad_norm``, ``differentiable=True``, or a
            sparse, complex or integer parameter.
    """

    def __init__(
        self,
        params: Any,
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
    ) -> None:
        self._init_fused(max_grad_norm, skip_nonfinite)
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
        )

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(
            rule=Rule.MOMENTUM if group["momentum"] != 0 else Rule.SGD,
            lr=float(group["lr"]),
            beta1=group["momentum"],
            weight_decay=float(group["weight_decay"]),
            dampening=group["dampening"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
        )
