"""Gradient accumulation: the gradient of one batch, from several backward passes on parts of it.

    g = round(w1 g1 + w2 g2 + ... + wk gk)       sums in fp32, in this order

Autograd would add into the 16-bit ``.grad`` and round k - 1 times: after 64 passes a bf16 sum has
lost three of its eight bits. Here the first gradient is stashed unchanged, the second is added to
it in fp32, and the last one is rounded together with the sum: as many passes over memory as
autograd makes (k - 1), of 8, 10, ..., 10 and 8 bytes an element instead of 6. fp32 gradients are
left to autograd, which adds them in fp32 anyway.

The weight of a part is its share in the divisor of the loss: a mean over 5 samples and one over 1
are not averaged, 5/6 and 1/6 of them are added. In a loop of your own::

    for (x, y), weight in zip(parts, batch_weights(criterion, [y for _, y in parts])):
        scaler.scale(weighted(criterion(model(x), y), weight)).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Accumulator:
    """Holds the gradients of all backward passes of a step but the last.

    Call ``stash`` after every backward but the last, and ``add_to`` with the last gradients.

    Args:
        params: those of the optimizer; only 16-bit ones are accumulated here.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = [p for p in params if p.dtype in (torch.float16, torch.bfloat16)]
        self._sums: dict[Tensor, Tensor] = {}  # after one pass the gradient itself, then fp32

    def stash(self) -> None:
        """Move the gradients out of ``.grad``."""
        for param in self._params:
            grad = param.grad
            if grad is None:
                continue
            held = self._sums.get(param)
            self._sums[param] = grad if held is None else _add(held, grad)
            param.grad = None

    def add_to(self, params: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
        """Add the sums of ``params`` to ``grads``, in place, rounding once."""
        for param, grad in zip(params, grads, strict=True):
            held = self._sums.pop(param, None)
            if held is not None:
                grad.copy_(_add(held, grad))

    def finish(self) -> None:
        """Add all remaining sums to ``.grad``; a parameter without one in the last pass gets it."""
        for param, held in list(self._sums.items()):
            if param.grad is None:
                param.grad = held.to(param.dtype)
                del self._sums[param]
            else:
                self.add_to([param], [param.grad])

    def clear(self) -> None:
        """Drop all sums, after a step that failed."""
        self._sums.clear()


def _add(held: Tensor, grad: Tensor) -> Tensor:
    """held + grad in fp32; in place once ``held`` is an fp32 sum."""
    return held.add_(grad) if held.dtype == torch.float32 else held.float().add_(grad)


# ---- weights of the parts ----

_PER_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
_PER_ELEMENT = (
    nn.BCELoss, nn.BCEWithLogitsLoss, nn.GaussianNLLLoss, nn.HuberLoss, nn.L1Loss, nn.MSELoss,
    nn.PoissonNLLLoss, nn.SmoothL1Loss, nn.SoftMarginLoss,
)  # fmt: skip


class Ranks(Protocol):
    """The processes that average their gradients, ``fastmp.distributed.rendezvous.World`` say."""

    @property
    def size(self) -> int:
        """Their number."""

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over them, in place."""


def loss_divisor(criterion: nn.Module, target: Tensor) -> Tensor | int | None:
    """The number that the mean of a loss is a sum divided by; None: it is a sum.

    Args:
        criterion: ``CrossEntropyLoss`` and ``NLLLoss``, torch's or fastmp's, divide by the class
            weights of the targets that are not ignored, or by their number; with probabilities as
            targets by their rows. torch's losses of single elements divide by the elements. A
            module whose only child is one of these has its divisor, one with a method
            ``divisor(target)`` its own. Any other loss is taken for a mean over the samples.
        target: of one batch; of a mixed pair the first, of which the second is a permutation.

    Returns:
        fp64 () on the device of the targets where their values count, without waiting for it.
    """
    own_divisor: Callable[[Tensor], Tensor | int] | None = getattr(criterion, "divisor", None)
    if own_divisor is not None:
        return own_divisor(target)
    children = list(criterion.children()) if isinstance(criterion, nn.Module) else []
    if len(children) == 1 and isinstance(children[0], _PER_CLASS + _PER_ELEMENT):
        return loss_divisor(children[0], target)
    if getattr(criterion, "reduction", "mean") == "sum":
        return None
    if isinstance(criterion, _PER_CLASS):
        if target.is_floating_point():
            return target.numel() // max(target.shape[min(1, target.dim() - 1)], 1)
        valid = target != criterion.ignore_index
        if criterion.weight is None:
            return valid.sum(dtype=torch.float64)
        of_target = criterion.weight.double()[torch.where(valid, target, 0).long()]
        return torch.where(valid, of_target, 0).sum()
    if isinstance(criterion, _PER_ELEMENT) or target.dim() == 0:
        return target.numel()
    return len(target)


def batch_weights(
    criterion: nn.Module, targets: Sequence[Tensor], ranks: Ranks | None = None
) -> list[Tensor | float]:
    """The factors that make losses of parts of a batch the loss of the whole.

    Equal parts have exactly 1/k in fp64; a part without a target that counts has 0. With ranks the
    parts of all of them are the batch: what they add up to is averaged over the ranks then, as
    DistributedDataParallel and FSDP do. That takes one exchange of one number, on the device.

    Args:
        criterion: see ``loss_divisor``. A sum needs no weights: its factors are 1, or with ranks
            their number.
        targets: of each part, in the order of the passes.
        ranks: None: this process is alone.

    Returns:
        numbers, or fp64 () where they are known on the device only.
    """
    size = 1 if ranks is None else ranks.size
    if size == len(targets) == 1:
        return [1.0]
    divisors = [loss_divisor(criterion, target) for target in targets]
    own = [divisor for divisor in divisors if divisor is not None]
    if not own:
        return [float(size)] * len(targets)
    total: Tensor | float = sum(own)
    if ranks is not None and size > 1:
        if not isinstance(total, Tensor):
            total = torch.full((), total, dtype=torch.float64, device=targets[0].device)
        total = ranks.sum(total.clone())
    return [divisor * size / total for divisor in own]


def weighted(loss: Tensor, weight: Tensor | float) -> Tensor:
    """``loss`` times its weight, in fp64 unless that is 1; 0, not NaN, where no target counts."""
    if not isinstance(weight, Tensor):
        return loss if weight == 1 else loss.double() * weight
    return torch.where(weight == 0, 0, loss.double() * weight)
