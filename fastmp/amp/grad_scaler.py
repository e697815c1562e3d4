"""The loss scaler."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastmp.optim.base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``, whose steps cost no pass of their own with a fastmp optimizer.

    Same arguments, errors and ``state_dict``; the scale grows and backs off by torch's own rule.
    With a fastmp optimizer the search for non-finite gradients happens inside the step, where the
    gradients are read anyway: one launch, and another for ``update``. Any other optimizer is served
    by torch's code. ``unscale_`` accepts fp16 gradients of a fastmp optimizer, with a warning: what
    it unscales in place is rounded to fp16 again, so gradients below 6e-8 vanish. To clip, pass
    ``max_grad_norm`` to the optimizer.

    Args:
        device: where the gradients are. None: the accelerator that is there, else "cpu"; torch's
            default, "cuda", disables the scaler on a machine without a GPU.
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch.
    """

    def __init__(
        self,
        device: str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if device is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else accelerator.type
        super().__init__(
            device, init_scale, growth_factor, backoff_factor, growth_interval, enabled
        )

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale, check and update, unless a gradient is not finite; see torch's method."""
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        state = self._ready_to_step(optimizer, kwargs)
        unscaled = state["stage"] is OptState.UNSCALED
        scale = None if unscaled else self._scale
        own = optimizer.step_context.grad_scale  # as in torch: the user's own scale on top
        if own is not None:
            scale = own if scale is None else scale * own
        found_inf = list(state["found_inf_per_device"].values())
        optimizer.grad_scale = scale
        optimizer.found_inf = found_inf[0] if unscaled and found_inf else None
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        state["stage"] = OptState.STEPPED
        state["found_inf_per_device"] = _found_inf_per_device(optimizer)
        return result  # type: ignore[no-any-return]

    def _ready_to_step(self, optimizer: FusedOptimizer, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The state of an optimizer before a step; torch's checks and errors."""
        if "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scale_growth_tracker("step")
        state: dict[str, Any] = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        return state

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Grow the scale, or back off after a skipped step; see torch's method.

        ``new_scale``, a number or fp32 of shape (1), is the scale from now on.
        """
        if self._enabled and len(self._per_optimizer_states) > 1:
            # torch sums them in place: not into the record of an optimizer
            for state in self._per_optimizer_states.values():
                found = state["found_inf_per_device"]
                state["found_inf_per_device"] = {d: t.clone() for d, t in found.items()}
        super().update(new_scale)

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        fused = isinstance(optimizer, FusedOptimizer)
        if fused and not allow_fp16:
            _warn_if_fp16(optimizer)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16 or fused)


def _found_inf_per_device(optimizer: FusedOptimizer) -> dict[torch.device, Tensor]:
    found_inf = optimizer.found_inf
    return {found_inf.device: found_inf} if optimizer.has_gradients_on(found_inf.device) else {}


def _warn_if_fp16(optimizer: torch.optim.Optimizer) -> None:
    params = (p for group in optimizer.param_groups for p in group["params"])
    if any(p.grad is not None and p.grad.dtype == torch.float16 for p in params):
        warnings.warn(
            "unscale_() rounds the unscaled fp16 gradients to fp16: those below 6e-8 vanish. "
            "To clip, pass max_grad_norm to the optimizer and leave unscale_() out.",
            UserWarning,
            stacklevel=4,
        )
