"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastmp.backends.abi import Hyperparameters
from fastmp.ops.update.rules import rule
from fastmp.ops.update.state_kinds import Quantity
from fastmp.optim.averages import Ema
from fastmp.optim.base import FusedOptimizer


def state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Adam's states of a group's parameters."""
    keys = ("exp_avg", "exp_avg_sq")
    return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys


def hyperparameters(group: dict[str, Any], lr: float) -> Hyperparameters:
    """Of a group of Adam's or AdamW's."""
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        rule=1 if group["amsgrad"] else 0,
        lr=lr,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        decoupled=group["decoupled_weight_decay"],
    )


class Adam(FusedOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` with fp32 masters and a fused step (Kingma & Ba, 2015).

    ``AdamW`` has an example, and what to read after a step.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
        lr: learning rate, a number or a tensor; schedules and torch's schedulers change it.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: times the weight, added to the gradient; see ``decoupled_weight_decay``.
        amsgrad: divide by the largest second average so far.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted as in torch; the step is always fused and capturable.
        differentiable: False; True is refused.
        decoupled_weight_decay: shrink the weight apart from the gradient, as ``AdamW`` does.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does, above 0; None: do not clip.
        skip_nonfinite: False: without a scaler and without clipping no scan of the gradients, 28
            bytes a parameter instead of 32 for fp32 weights; non-finite values then reach the
            weights, as in torch.
        ema: decay of an average of the weights, in [0, 1), that the step moves along with them, 8
            bytes a parameter; or one decay for each applied step, or a function of their number,
            evaluated here (for its ``length``, or 100,000 steps; the last decay stays). See
            ``averages`` and ``averaged``.
        state_dtype: how moments are kept: None or ``torch.float32``; ``torch.bfloat16``, 8 bytes a
            parameter less to move; ``"8bit"``, 12 less, with tensors below 4,096 elements in fp32.
            Both are rounded stochastically, by bits that the step, the parameter and the element
            determine.
        master: None: fp16 weights have an fp32 master; "split": a 16-bit remainder, 4 bytes a
            parameter less to move, exact above 2^-17 and up to 65,504, within 2^-41 below; a weight
            that overflows to inf stays there. bf16 weights always have a remainder.

    Raises:
        ValueError: as torch, a ``max_grad_norm`` that is not above 0, a decay outside [0, 1), an
            unknown ``state_dtype`` or ``master``, ``differentiable=True``, or a sparse, complex or
            integer parameter.
    """

    def __init__(
        self,
        params: ParamsT,
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
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
    ) -> None:
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
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema=ema,
            state_dtype=state_dtype,
            master=master,
        )

    @rule(0, Quantity.SIGNED, Quantity.SQUARE)
    @rule(1, Quantity.SIGNED, Quantity.SQUARE, Quantity.MAXIMUM)  # amsgrad
    @staticmethod
    def _rule(
        p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyperparameters
    ) -> Tensor:
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
        return state_keys(group)

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        return hyperparameters(group, self._lr(group))


class AdamW(Adam, torch.optim.AdamW):
    """``torch.optim.AdamW`` with fp32 masters and a fused step (Loshchilov & Hutter, 2019).

        model = fastmp.convert(model, torch.bfloat16)
        optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        loss.backward()
        optimizer.step()
        optimizer.grad_norm        # before clipping
        optimizer.found_inf        # 1: a gradient was not finite, and the step changed nothing
        optimizer.zero_grad()

    After a step also ``applied_steps`` and ``skipped_steps``, counts of all steps so far; all four
    are tensors on the device, and reading them as numbers waits for it. ``nonfinite_param()`` names
    the parameter that overflowed; ``masters()`` are the fp32 weights.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64. fp16 and bf16
            weights have an fp32 master in the state, and so lose no update to rounding.
        lr: learning rate, a number or a tensor; schedules and torch's schedulers change it.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the root of the second average.
        weight_decay: share of the lr by which a weight shrinks in a step, apart from the gradient.
        amsgrad: divide by the largest second average so far.
        foreach, fused, capturable: accepted as in torch; the step is always fused and capturable.
        maximize: ascend.
        differentiable: as in torch; True is refused.
        max_grad_norm, skip_nonfinite, ema, state_dtype, master: as in ``Adam``: clip inside the
            step; skip steps that overflow; an average of the weights; narrow moments; how the
            masters of fp16 weights are kept.

    Raises:
        ValueError: as ``Adam``.
    """

    def __init__(
        self,
        params: ParamsT,
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
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
    ) -> None:
        FusedOptimizer.__init__(
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
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema=ema,
            state_dtype=state_dtype,
            master=master,
        )
