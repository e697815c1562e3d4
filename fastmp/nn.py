"""Drop-in modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmp import functional
from fastmp.ops.loss import MixedTarget


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on fastmp's kernels, with mixed targets.

    The arguments, their order and defaults are torch's, and so are the values; the loss of 16-bit
    logits comes in fp32.
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
            grad_scale: the incoming gradient to expect, e.g. the loss scale; changes no result.
        """
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            grad_scale=grad_scale,
        )
