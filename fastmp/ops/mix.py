"""Mixup and cutmix of a batch, with normalisation and cast in the same pass.

::

    mixup   out[i] = λ_i·norm(x[i]) + (1-λ_i)·norm(x[index[i]])
    cutmix  out[i] = norm(x[index[i]]) inside the box, norm(x[i]) outside
    norm(x) = scale_c·x + shift_c

Zhang et al. 2018 (mixup, arXiv:1710.09412), Yun et al. 2019 (CutMix, arXiv:1905.04899).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.ops.checks import check_lam


def _check_values(
    input: Tensor, lam: Tensor | None, index: Tensor | None, box: Tensor | None, *others: object
) -> None:
    """Check values where they are on the host; elsewhere that would wait for the device."""
    check_lam(lam)
    batch, _, height, width = input.shape
    if index is not None and registry.on_host(index) and batch:
        low, high = (int(value) for value in torch.aminmax(index))
        if low < 0 or high >= batch:
            raise IndexError(
                f"index must lie in [0, {batch}), the batch, got values from {low} to {high}"
            )
    if box is not None and registry.on_host(box) and box.numel():
        top, bottom, left, right = box.reshape(-1, 4).unbind(1)
        inside = (top >= 0) & (top <= bottom) & (bottom <= height)
        inside &= (left >= 0) & (left <= right) & (right <= width)
        if not inside.all():
            worst = box.reshape(-1, 4)[int((~inside).nonzero()[0])].tolist()
            raise ValueError(
                f"box must be (top, bottom, left, right) within an image of {height} x {width}, "
                f"got {tuple(worst)}"
            )


def mix_reference(
    input: Tensor,
    lam: Tensor | None,
    index: Tensor | None,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``fastmp::mix`` in plain PyTorch; differentiable with respect to ``input``.

    Args:
        input: (N, C, H, W), floating or uint8.
        lam: () or (N), weight of the sample itself; not read with a box.
        index: (N), int64, partner of each sample; None: no mixing.
        box: (4) or (N, 4), int64, top, bottom, left, right of the partner's pixels.
        scale, shift: (C), or both None.
        dtype: floating dtype of the result.

    Returns:
        (N, C, H, W), contiguous, ``dtype``.

    Raises:
        IndexError, ValueError: index, box or λ on the host out of range.
    """
    _check_values(input, lam, index, box)
    wide = torch.float64 if torch.float64 in (input.dtype, dtype) else torch.float32
    x = input.to(wide)
    if scale is not None and shift is not None:
        x = x * scale.to(wide)[:, None, None] + shift.to(wide)[:, None, None]
    if index is not None:
        partner = x[index]
        if box is not None:
            top, bottom, left, right = box.reshape(-1, 4)[..., None, None, None].unbind(1)
            row = torch.arange(x.shape[2], device=x.device)[:, None]
            column = torch.arange(x.shape[3], device=x.device)
            inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
            x = torch.where(inside, partner, x)
        elif lam is not None:
            mix_weight = lam.to(wide).reshape(-1, 1, 1, 1)
            x = mix_weight * x + (1 - mix_weight) * partner
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _mix_fake(
    input: Tensor, lam: Any, index: Any, box: Any, scale: Any, shift: Any, dtype: Any
) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


registry.define(
    "mix",
    registry.TorchOp(
        "mix(Tensor input, Tensor? lam, Tensor? index, Tensor? box, Tensor? scale, Tensor? shift, "
        "ScalarType dtype) -> Tensor",
        mix_reference,
        _mix_fake,
        _check_values,
    ),
)
