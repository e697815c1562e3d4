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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmp.fused import Fused
from fastmp.ops.rules import Hyper, rule

__all__ = ["SGD", "Adam", "AdamW", "Lion"]


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

    @rule(0, "AdamRule<false>")
    @rule(1, "AdamRule<true>")
    @staticmethod
    def _rule(p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyper) -> Tensor:
        if h.decoupled:
            p = p * (1 - h.lr * h.weight_decay)
        else:
            g = g + h.weight_decay * p
        m, v = states[0], states[1]
        m.lerp_(g, 1 - h.beta1)
        v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
        if len(states) == 3:
            v = torch.maximum(states[2], v, out=states[2])
        denominator = v.sqrt() / (1 - h.beta2**step) ** 0.5 + h.eps
        return torch.addcdiv(p, m, denominator, value=-h.lr / (1 - h.beta1**step))

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        keys = ("exp_avg", "exp_avg_sq")
        return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(
            rule=1 if group["amsgrad"] else 0,
            lr=self._lr(group),
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

    @rule(2, "SgdRule<false>")
    @rule(3, "SgdRule<true>")
    @staticmethod
    def _rule(p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyper) -> Tensor:
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

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(
            rule=3 if group["momentum"] != 0 else 2,
            lr=self._lr(group),
            beta1=group["momentum"],
            weight_decay=float(group["weight_decay"]),
            dampening=group["dampening"],
            maximize=group["maximize"],
            nesterov=group["nesterov"],
        )


class Lion(Fused):
    """Lion with fp32 masters and a fused step (Chen et al. 2023, arXiv:2302.06675).

    The sign of an average of the gradients, and half of Adam's state. The paper advises a third to
    a tenth of AdamW's ``lr`` and three to ten times its ``weight_decay``. torch has no Lion; the
    arguments are those of the paper's own code.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr: learning rate, at least 0.
        betas: how much of the average the step and the average itself keep, in [0, 1).
        weight_decay: decoupled, as in AdamW, at least 0.
        maximize: ascend instead of descend.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does; None: do not clip.
        skip_nonfinite: as in ``Adam``.

    Raises:
        ValueError: a negative ``lr``, ``weight_decay`` or ``max_grad_norm``, a beta outside [0, 1),
            or a sparse, complex or integer parameter.
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
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        self._init_fused(max_grad_norm, skip_nonfinite)
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    @rule(4, "LionRule")
    @staticmethod
    def _rule(p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyper) -> Tensor:
        (m,) = states
        direction = (m * h.beta1 + g * (1 - h.beta1)).sign()
        m.mul_(h.beta2).add_(g, alpha=1 - h.beta2)
        return p * (1 - h.lr * h.weight_decay) - h.lr * direction

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _hyper(self, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = group["betas"]
        return Hyper(
            rule=4,
            lr=self._lr(group),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
