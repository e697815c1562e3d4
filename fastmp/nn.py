"""Drop-in modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp.functional.cross_entropy import cross_entropy
from fastmp.functional.linear import linear
from fastmp.ops.checks import wide_dtype
from fastmp.ops.linear import ACTIVATIONS
from fastmp.ops.loss import MixedTarget

torch.fx.wrap("linear")  # one node where a model is traced, as torch's own layers are


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` and its activation in one operation: ``act(x Wᵀ + b)``.

    The parameters, their initialisation and the ``state_dict`` are torch's.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu"; see
            ``fastmp.functional.linear``.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features); see ``fastmp.functional.linear``."""
        return linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """torch's, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on fastmp's kernels, with mixed targets.

    The values are torch's; the loss of 16-bit logits comes in fp32.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch.
    """

    def forward(
        self,
        input: Tensor,
        target: Tensor | MixedTarget,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """The loss; see ``fastmp.functional.cross_entropy`` for shapes, dtypes and errors.

        Args:
            input: logits, (C), (N, C) or (N, C, d1, ...).
            target: class indices, class probabilities, or a ``MixedTarget``.
            grad_scale: the gradient of the loss in the backward, e.g. the loss scale; changes no
                result.
        """
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            grad_scale=grad_scale,
        )


class _InFp32(torch.nn.modules.instancenorm._InstanceNorm):
    """Computes in fp32: torch rounds running statistics to the dtype of the input at every call."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(wide_dtype(input.dtype))).to(input.dtype)


class InstanceNorm1d(_InFp32, torch.nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``, torch's own arguments; in fp32 also for 16-bit inputs."""


class InstanceNorm2d(_InFp32, torch.nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``, torch's own arguments; in fp32 also for 16-bit inputs."""


class InstanceNorm3d(_InFp32, torch.nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``, torch's own arguments; in fp32 also for 16-bit inputs."""
