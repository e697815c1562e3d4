"""Gradient accumulation: 16-bit gradients of several backward passes, summed in fp32, rounded once.

    g = round(g1 + g2 + ... + gk)                sums in fp32, in this order

Autograd would add into the 16-bit ``.grad`` and round k - 1 times: after 64 passes a bf16 sum has
lost three of its eight bits. Here the first gradient is stashed unchanged, the second is added to
it in fp32, and the last one is rounded together with the sum: as many passes over memory as
autograd makes (k - 1), of 8, 10, ..., 10 and 8 bytes an element instead of 6. fp32 gradients are
left to autograd, which adds them in fp32 anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
