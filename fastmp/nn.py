"""Drop-in modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastmp.functional.cross_entropy import cross_entropy
from fastmp.functional.linear import linear, linear_before
from fastmp.functional.linear_autograd import activate_after
from fastmp.functional.linear_cross_entropy import linear_cross_entropy
from fastmp.ops.checks import wide_dtype
from fastmp.ops.linear import ACTIVATIONS
from fastmp.ops.loss import MixedTarget

for name in ("activate_after", "linear", "linear_before"):
    torch.fx.wrap(name)  # one node where a model is traced, as torch's own layers are


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` and its activation in one operation: ``act(x Wᵀ + b)``.

    The parameters, their initialisation and the ``state_dict`` are torch's. ``following`` is the
    activation of another module that may get the result: it changes when the operation is worth a
    call, and no value.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu"; see
            ``fastmp.functional.linear``.

    Raises:
        ValueError: an unknown activation.
    """

    activation = following = "none"

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
        if self.activation == "none" != self.following:
            return linear_before(input, self.weight, self.bias, self.following)
        return linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """torch's, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation}"


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU``, torch's own arguments; see ``linear_autograd.activate_after``."""

    kind = "relu"

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, fp32, bf16, fp16 or fp64, to the same."""
        return super().forward(input) if self.inplace else activate_after(input, self.kind)


class SiLU(torch.nn.SiLU):
    """``torch.nn.SiLU``, torch's own arguments; see ``linear_autograd.activate_after``."""

    kind = "silu"

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, fp32, bf16, fp16 or fp64, to the same."""
        return super().forward(input) if self.inplace else activate_after(input, self.kind)


class GELU(torch.nn.GELU):
    """``torch.nn.GELU``, torch's own arguments; see ``linear_autograd.activate_after``."""

    @property
    def kind(self) -> str:
        """Its name among the activations of ``fastmp.functional.linear``."""
        return "gelu" if self.approximate == "none" else "gelu_tanh"

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, fp32, bf16, fp16 or fp64, to the same."""
        return activate_after(input, self.kind)


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential``, torch's own arguments; a layer and its activation are one operation.

    Neighbours are looked up at each call. They are one operation if both are modules of fastmp and
    neither has hooks: then nothing but this loop can see the value in between.
    """

    def forward(self, input: Tensor) -> Tensor:
        """What the modules return one after the other, in their shapes and dtypes."""
        if _has_any_global_hook():
            return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        layer = None  # not yet called: an activation may follow
        for module in self._modules.values():
            if layer is not None:
                if type(module) in ACTIVATION_MODULES and _is_plain(module):
                    kind = cast(ReLU | SiLU | GELU, module).kind
                    input, layer = linear(input, layer.weight, layer.bias, kind), None
                    continue
                input, layer = layer(input), None
            if type(module) is Linear and type(input) is Tensor and _is_plain(module):
                layer = module
            else:
                input = module(input)
        return input if layer is None else layer(input)


ACTIVATION_MODULES = (ReLU, SiLU, GELU)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module computes ``x Wᵀ + b`` or act(z) and does nothing else."""
    forward = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    extra = module._backward_hooks or module._backward_pre_hooks
    return not (forward or extra) and getattr(module, "activation", "none") == "none"


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


class LinearCrossEntropyLoss(torch.nn.Module):
    """The last linear layer and its loss, without the logits; for large vocabularies.

    ``torch.nn.LinearCrossEntropyLoss`` on fastmp's kernels, with mixed targets. The layer is
    ``linear``: assign an embedding's weight to ``linear.weight`` to tie them.

    Args:
        in_features, num_classes, bias, device, dtype: of the layer.
        weight: class weights, shape (num_classes).
        reduction, ignore_index, label_smoothing, chunk: see
            ``fastmp.functional.linear_cross_entropy``.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.chunk = chunk

    def forward(self, input: Tensor, target: Tensor | MixedTarget) -> Tensor:
        """The loss; see ``fastmp.functional.linear_cross_entropy`` for shapes and errors.

        Args:
            input: (in_features) or (N, in_features).
            target: class indices, or a ``MixedTarget``.
        """
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            chunk=self.chunk,
        )
