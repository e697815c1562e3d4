"""The tensors of an optimizer step, and the kernel that a backend lays them out for."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.native_table import Lrs, Options, TensorRow

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment,misc]


class _Kernel(Protocol):
    """The object that a backend's kernel of ``update`` makes of (rows, gradients).

    The methods of ``StepTable``, and ``step`` with the arguments of ``ops.update.run``. Gradients
    are let go of after it.
    """

    def matches(self, params: Sequence[Tensor]) -> bool: ...
    def bind_gradients(self, grads: Sequence[Tensor]) -> bool: ...
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
        self._layouts = Layouts([*self.params, *grads])
        self._dtypes = [param.dtype for param in self.params]
        self.kernel: _Kernel | None = None
        self.fallback: str | None = "no tensors"
        self.grads: list[Tensor] = []
        if rows:
            make, reason = registry.select("update", rows[0].param.device, rows, grads)
            self.fallback = reason if make is None else None
            self.kernel = None if make is None else make(rows, grads)
        if self.kernel is None:
            self.grads = list(grads)

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are still the parameters of the table, where it was laid out for them."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if self.kernel is not None:
            return self.kernel.matches(params)
        return [param.dtype for param in params] == self._dtypes

    def bind_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Use these gradients, one per row, in the next step; False if the table cannot hold them.

        They, or the parameters, have other dtypes, shapes or strides then, perhaps at the same
        addresses. Make another table, which says what is wrong if anything is.
        """
        if not self._layouts.match([*self.params, *grads]):
            return False
        if self.kernel is not None:
            return self.kernel.bind_gradients(grads)
        self.grads = list(grads)
        return True


class Layouts:
    """Dtypes, shapes and strides of tensors, to compare with those of others; keeps no tensor.

    One pass of C++ for all of them: the guards of ``torch.compile``, which compare more than that
    (device, requires_grad, type). Where those differ, and where a torch has none, Python decides.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._expected = _layouts(tensors)
        self._guards: Any = None
        if TensorGuards is not None and tensors:
            dynamic = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
            self._guards = TensorGuards(*tensors, **dynamic)

    def match(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these, as many, have the same layouts."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        return _layouts(tensors) == self._expected


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """None for a sparse one, which has no strides."""
    strided = torch.strided
    return [
        (t.dtype, t.shape, t.stride(), t.is_neg()) if t.layout == strided else None for t in tensors
    ]


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
