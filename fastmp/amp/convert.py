"""The conversion of a model to 16-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmp.amp.fusion import fuse_linear

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
            ``fastmp.amp.fusion.fuse_linear``. This stays so when a later call goes back to fp32.

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
