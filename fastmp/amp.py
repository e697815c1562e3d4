"""Precision policy: the loss scaler and the conversion of a model to 16-bit weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastmp.fused import Fused
from fastmp.fusion import fuse_linear

__all__ = ["GradScaler", "convert"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``, whose steps cost no pass of their own with a fastmp optimizer.

    Same arguments, errors and ``state_dict``; the scale grows and backs off by torch's own rule.
    With a fastmp optimizer the search for non-finite gradients happens inside the step, where the
    gradients are read anyway; any other optimizer is served by torch's code. ``unscale_`` accepts
    fp16 gradients of a fastmp optimizer, with a warning: what it unscales in place is rounded to
    fp16 again, so gradients below 6e-8 vanish. To clip, pass ``max_grad_norm`` to the optimizer.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Unscale, check and update, unless a gradient is not finite; see torch's method."""
        result = super().step(optimizer, *args, **kwargs)
        if self._enabled and isinstance(optimizer, Fused):
            found = self._found_inf_per_device(optimizer)
            for device in found:
                found[device] = optimizer.found_inf.clone()
        return result

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not isinstance(optimizer, Fused):
            return super()._check_inf_per_device(optimizer)
        # Nothing found yet: the step looks for itself, and step() above passes on what it found.
        params = (p for group in optimizer.param_groups for p in group["params"])
        device = next((p.device for p in params if p.grad is not None), None)
        found = {} if device is None else {device: torch.zeros((), device=device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        fused = isinstance(optimizer, Fused)
        if fused and not allow_fp16:
            _warn_if_fp16(optimizer)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16 or fused)


def _warn_if_fp16(optimizer: torch.optim.Optimizer) -> None:
    params = (p for group in optimizer.param_groups for p in group["params"])
    if any(p.grad is not None and p.grad.dtype == torch.float16 for p in params):
        warnings.warn(
            "unscale_() rounds the unscaled fp16 gradients to fp16: those below 6e-8 vanish. "
            "To clip, pass max_grad_norm to the optimizer and leave unscale_() out.",
            UserWarning,
            stacklevel=4,
        )


def convert(
    model: nn.Module, dtype: torch.dtype = torch.float16, *, fuse: bool = True
) -> nn.Module:
    """Give a model 16-bit weights and fused linear layers, in place; batch norms stay fp32.

    Parameters and floating-point buffers become ``dtype``; those of batch norms become fp32,
    because their running statistics are sums over many steps. Parameters stay the same objects and
    ``state_dict`` keys do not change. The model then expects inputs of ``dtype``.

    Args:
        model: any module.
        dtype: ``torch.float16``, ``torch.bfloat16``, or ``torch.float32`` to go back.
        fuse: make every ``torch.nn.Linear`` a ``fastmp.nn.Linear`` that applies the ReLU, GELU or
            SiLU after it, wherever that certainly changes no value; see
            ``fastmp.fusion.fuse_linear``. This stays so when a later call goes back to fp32.

    Returns:
        The same module.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another dtype.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if dtype not in _DTYPES:
        expected = ", ".join(map(str, _DTYPES))
        raise ValueError(f"expected dtype to be one of {expected}, got {dtype}")
    for module in model.modules():
        target = torch.float32 if isinstance(module, nn.modules.batchnorm._BatchNorm) else dtype

        def cast(tensor: Tensor, target: torch.dtype = target) -> Tensor:
            return tensor.to(target) if tensor.is_floating_point() else tensor

        module._apply(cast, recurse=False)
    return fuse_linear(model) if fuse else model
