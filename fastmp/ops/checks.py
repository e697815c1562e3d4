"""Checks of arguments that several operations share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.backends.abi import LossSpec
from fastmp.backends.registry import on_host


def transformed(grad_output: Tensor | None = None) -> bool:
    """Whether ``torch.func``, ``vmap`` or forward-mode differentiation is at work.

    They have rules for torch's own operations only: fastmp's are then composed of those. The older
    vmap of ``torch.autograd.functional`` and ``is_grads_batched`` shows in grad_output.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or (grad_output is not None and torch._C._functorch.is_legacy_batchedtensor(grad_output))
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of intermediate results: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_lam(lam: Tensor | None) -> None:
    """Raise ValueError unless every λ that is on the host lies in [0, 1]."""
    if lam is None or not on_host(lam) or lam.numel() == 0:
        return
    low, high = (lam.item(),) * 2 if lam.dim() == 0 else (x.item() for x in torch.aminmax(lam))
    if not (low >= 0 and high <= 1):
        raise ValueError(f"lam must lie in [0, 1], got values from {low} to {high}")


def check_values(spec: LossSpec, classes: int) -> None:
    """Raise unless the targets and λ that are on the host are in range; a device would wait.

    Raises:
        IndexError: a target is no class.
        ValueError: a λ is outside [0, 1].
    """
    for y in (spec.target_a, spec.target_b):
        if y is None or not on_host(y):
            continue
        bad = ((y < 0) | (y >= classes)) & (y != spec.ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise spec.target_error(row, int(y[row]), classes)
    check_lam(spec.lam)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise RuntimeError unless the tensor is on the device of input."""
    if tensor.device != device:
        raise RuntimeError(
            f"{name} must be on the device of input ({device}), got {tensor.device}; "
            f"call {name}.to(input.device)"
        )


def check_number(lam: float) -> None:
    """Raise ValueError unless λ lies in [0, 1]."""
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")


def lam_of_rows(
    lam: Tensor | float, target: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """λ as a tensor, () or one for each element of target.

    Args:
        lam: a number, or (), (N), or shaped as target.
        target: (N, d1, ...); only its shape counts.

    Raises:
        ValueError, TypeError, RuntimeError: wrong range (of a number), shape, dtype or device.
    """
    if not isinstance(lam, Tensor):
        check_number(lam)
        return torch.full((), lam, dtype=dtype, device=device)
    if lam.requires_grad:
        raise ValueError("lam is a constant of the loss and has no gradient: call lam.detach()")
    if not lam.is_floating_point():
        raise TypeError(f"lam must be floating-point, got {lam.dtype}; call .float()")
    if lam.dim() > 0:
        check_device("lam", lam, device)
    lam = lam.to(device, dtype, non_blocking=True)  # a number from the host is copied at once
    if lam.dim() == 0:
        return lam
    if lam.shape == target.shape:
        return lam.reshape(-1)
    if lam.shape == target.shape[:1]:
        per_sample = lam.reshape(-1, *[1] * (target.dim() - 1))
        return per_sample.expand(target.shape).reshape(-1)
    raise ValueError(
        f"lam must be a number or have the shape (), {tuple(target.shape[:1])} or "
        f"{tuple(target.shape)}, got {tuple(lam.shape)}"
    )
