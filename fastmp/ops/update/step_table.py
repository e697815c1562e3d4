"""The tensors of an optimizer step, and the kernel that a backend lays them out for."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.layouts import Layouts
from fastmp.backends.native_table import Lrs, Options, TensorRow


class _Kernel(Protocol):
    """The object that a backend's kernel of ``update`` makes of (rows, gradients).

    The methods of ``StepTable``, and ``step`` with the arguments of ``ops.update.run``. Gradients
    are let go of after it.
    """

    def matches(self, params: Sequence[Tensor]) -> bool: ...
    def bind_gradients(self, grads: Sequence[Tensor], addresses: np.ndarray | None) -> None: ...
    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None: ...


class StepTable:
    """The tensors of a step, laid out once and bound to new gradients every step.

    Attributes:
        rows: one for each parameter that has a gradient.
        grads: for the reference, until the step; empty if there is a kernel.
        kernel: None: the step runs on the reference.
        fallback: the reason for that.
    """

    def __init__(self, rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
        """Check the tensors and have a backend lay them out.

        Raises:
            ValueError: parameters on several devices, or a gradient of another shape or device.
            RuntimeError: a sparse gradient.
        """
        _check(rows, grads)
        self.rows = list(rows)
        self.params = [row.param for row in rows]
        self._layouts = Layouts(self.params, grads)
        self.kernel: _Kernel | None = None
        self.fallback: str | None = "no tensors"
        self.grads: list[Tensor] = []
        if rows:
            make, reason = registry.select("update", rows[0].param.device, rows, grads)
            self.fallback = reason if make is None else None
            self.kernel = None if make is None else make(rows, grads)
        if self.kernel is None:
            self.grads = list(grads)

    def bind(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Use these gradients, one per row, in the next step; False if the table cannot hold them.

        The parameters are others then, or elsewhere, or layouts differ, perhaps at the same
        addresses. Make another table, which says what is wrong if anything is.
        """
        addresses = self._layouts.addresses(params, grads)
        if addresses is None and not self._fits(params, grads):
            return False
        if self.kernel is not None:
            self.kernel.bind_gradients(grads, addresses)
        else:
            self.grads = list(grads)
        return True

    def _fits(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if self.kernel is not None and not self.kernel.matches(params):
            return False
        return self._layouts.match(params, grads)


def _check(rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
    devices = {row.param.device for row in rows}
    if len(devices) > 1:
        raise ValueError(
            "expected all parameters of an optimizer on one device, got "
            f"{', '.join(sorted(map(str, devices)))}; use one optimizer per device"
        )
    for row, grad in zip(rows, grads, strict=True):
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {row.param_index} is {grad.layout}: sparse gradients "
                "are not supported; use sparse=False in the layer, or torch.optim.SparseAdam"
            )
        if grad.shape != row.param.shape or grad.device != row.param.device:
            raise ValueError(
                f"the gradient of parameter {row.param_index} does not fit it: expected shape "
                f"{tuple(row.param.shape)} on {row.param.device}, got {tuple(grad.shape)} "
                f"on {grad.device}; call zero_grad() after changing a parameter"
            )
