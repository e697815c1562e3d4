"""Mixup and cutmix as a function, with its argument validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.ops.checks import check_device, lam_of_rows, wide_dtype
from fastmp.ops.mix import mix_reference


def mix(
    input: Tensor,
    lam: Tensor | float | None,
    index: Tensor | None,
    *,
    box: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mixup or cutmix of a batch, with normalisation and cast, in one pass and out of place.

    ``out[i] = lam * norm(x[i]) + (1 - lam) * norm(x[index[i]])``; with a box
    ``norm(x[index[i]])`` inside and ``norm(x[i])`` outside, and ``lam`` is not applied.
    ``norm(x) = (x - mean) / std`` for each channel; uint8 is divided by 255 before. Zhang et al.
    2018 (mixup, arXiv:1710.09412), Yun et al. 2019 (CutMix, arXiv:1905.04899).

    Args:
        input: (N, ...), floating or uint8; (N, C, H, W) for a box, mean or std.
        lam: weight of the sample itself in [0, 1]: a number, a 0-d tensor or (N).
        index: (N), int64, the partner of each sample; None: normalise and cast alone.
        box: (4) or (N, 4), int64: top, bottom, left, right, the ends not included.
        mean: C values; default 0.
        std: C values, none of them 0; default 1.
        dtype: floating dtype of the result; default that of ``input``, fp32 for uint8.

    Returns:
        A new contiguous tensor in the shape of ``input``, differentiable with respect to it.

    Raises:
        IndexError: ``index`` is out of range (CPU; on a GPU that sample becomes NaN).
        ValueError, TypeError, RuntimeError: another argument is, or has a wrong type or device.
    """
    if input.dim() == 0:
        raise ValueError("input must be a batch (N, ...), got a scalar")
    if not (input.is_floating_point() or input.dtype == torch.uint8):
        raise TypeError(f"input must be floating-point or uint8, got {input.dtype}; call .float()")
    if dtype is None:
        dtype = input.dtype if input.is_floating_point() else torch.float32
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if input.dim() != 4 and not (box is None and mean is None and std is None):
        raise ValueError(
            f"box, mean and std need input of shape (N, C, H, W), got {tuple(input.shape)}"
        )
    mix_weight = _check_partners(input, lam, index, box)
    images = input if input.dim() == 4 else input.reshape(input.shape[0], 1, 1, -1)
    scale, shift = _affine(images, mean, std)
    arguments = (images, mix_weight, index, box, scale, shift, dtype)
    if torch.is_grad_enabled() and input.requires_grad:
        return mix_reference(*arguments).reshape(input.shape)
    output: Tensor = torch.ops.fastmp.mix(*arguments)
    return output.reshape(input.shape)


def _check_indices(
    name: str, given: Tensor, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {given!r}")
    if given.dtype != torch.int64 or given.shape not in shapes:
        raise ValueError(
            f"{name} must be int64 of shape {' or '.join(map(str, shapes))}, "
            f"got {given.dtype} of shape {tuple(given.shape)}"
        )
    check_device(name, given, device)


def _check_partners(
    input: Tensor, lam: Tensor | float | None, index: Tensor | None, box: Tensor | None
) -> Tensor | None:
    """λ as a tensor; checks index and box."""
    batch = input.shape[:1]
    if index is None:
        if lam is not None or box is not None:
            raise ValueError("lam and box mix with a partner: give index, or leave them out")
        return None
    _check_indices("index", index, [tuple(batch)], input.device)
    if box is not None:
        _check_indices("box", box, [(4,), (*batch, 4)], input.device)
    elif lam is None:
        raise ValueError("lam is missing: mixing without a box needs a weight in [0, 1]")
    if lam is None:
        return None
    wide = wide_dtype(input.dtype)
    return lam_of_rows(lam, index, input.device, wide)


def _affine(
    images: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(x / unit - mean) / std as scale and shift; unit is 255 for uint8."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    if mean is None and std is None and unit == 1.0:
        return None, None
    options = (unit, images.shape[1], images.device, wide_dtype(images.dtype))
    if isinstance(mean, Tensor) or isinstance(std, Tensor) or torch.compiler.is_compiling():
        return _scale_and_shift(mean, std, *options)
    mean_of, std_of = (None if values is None else tuple(values) for values in (mean, std))
    return _scale_and_shift_once(mean_of, std_of, *options)


def _scale_and_shift(
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    unit: float,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    mean_of, std_of = (
        torch.full((channels,), default, dtype=torch.float64, device="cpu")
        if values is None
        else values.double()
        if isinstance(values, Tensor)
        else torch.tensor(values, dtype=torch.float64, device="cpu")
        for values, default in ((mean, 0.0), (std, 1.0))
    )
    for name, values in (("mean", mean_of), ("std", std_of)):
        if values.shape != (channels,):
            raise ValueError(
                f"{name} must have one value for each of the {channels} channels, "
                f"got shape {tuple(values.shape)}"
            )
    if registry.on_host(std_of) and not torch.compiler.is_compiling() and (std_of == 0).any():
        raise ValueError(f"std must not be 0, got {std_of.tolist()}")
    mean_of, std_of = mean_of.to(device), std_of.to(device)
    return (1 / (unit * std_of)).to(dtype), (-mean_of / std_of).to(dtype)


# Numbers go to a device once: each copy would wait for it, and cannot be captured in a CUDA graph.
_scale_and_shift_once = cache(_scale_and_shift)
