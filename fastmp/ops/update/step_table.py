"""The tensors of an optimizer step, and the kernel that a backend lays them out for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from operator import is_
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.layouts import TensorReader, layouts
from fastmp.backends.native_table import Lrs, Options, TensorRow, is_dense


class _Kernel(Protocol):
    """The object that a backend's kernel of ``update`` makes of (rows, gradients), not yet bound.

    The methods of ``StepTable``, and ``step`` with the arguments of ``ops.update.run``. Gradients
    are let go of after it. ``bind_gradients(None)``: of the parameters' own, whose addresses have
    been written.

    Attributes:
        addresses: of the gradients, int64, one per row, where the kernel reads them. None: it takes
            the tensors.
    """

    addresses: np.ndarray | None

    def matches(self, params: Sequence[Tensor]) -> bool: ...
    def bind_gradients(self, grads: Sequence[Tensor] | None) -> None: ...
    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None: ...


class StepTable:
    """The tensors of a step, laid out once and bound to new gradients every step.

    Attributes:
        rows: one for each parameter that has a gradient.
        grads: for the reference, until the step; empty if there is a kernel.
        kernel: None: the step runs on the reference.
        fallback: the reason for that.
        reader: of all tensors in one call; None: Python reads them.
    """

    def __init__(
        self,
        rows: Sequence[TensorRow],
        grads: Sequence[Tensor],
        groups: Sequence[list[Tensor]] = (),
    ) -> None:
        """Check the tensors and have a backend lay them out.

        Args:
            rows, grads: as many.
            groups: the parameters that ``rebind`` is called with; those of them that have a
                gradient are the ones of the rows, and these are their gradients.

        Raises:
            ValueError: parameters on several devices or on the same memory, or a gradient of
                another shape or device.
            RuntimeError: a sparse gradient.
        """
        _check(rows, grads)
        self.rows = list(rows)
        self.params = [row.param for row in rows]
        self._layouts = layouts(chain(self.params, grads))
        self.kernel: _Kernel | None = None
        self.fallback: str | None = "no tensors"
        self.grads: list[Tensor] = []
        self.reader: TensorReader | None = None
        if rows:
            make, reason = registry.select("update", rows[0].param.device, rows, grads)
            self.fallback = reason if make is None else None
            self.kernel = None if make is None else make(rows, grads)
        if groups and self.kernel is not None and self.kernel.addresses is not None:
            self.reader = TensorReader.of(groups, self.kernel.addresses)
        self.bind_alike(grads)

    def rebind(self, groups: Sequence[list[Tensor]]) -> bool:
        """Use the gradients that these parameters have now in the next step.

        False: something is not as in the step before, as far as one call of the native library can
        tell; ``bind`` can tell more.
        """
        if self.reader is None or self.kernel is None or not self.reader.read(groups):
            return False
        self.kernel.bind_gradients(None)
        return True

    def bind(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Use these gradients, one per row, in the next step; False if the table cannot hold them.

        The parameters are others then, or elsewhere, or layouts differ, perhaps at the same
        addresses. Make another table, which says what is wrong if anything is.
        """
        if not self._fits(params, grads):
            return False
        self.bind_alike(grads)
        return True

    def bind_alike(self, grads: Sequence[Tensor]) -> None:
        """As ``bind``, of gradients that are known to fit."""
        if self.kernel is not None:
            self.kernel.bind_gradients(grads)
        else:
            self.grads = list(grads)

    def raise_versions(self) -> None:
        """Autograd has not seen the writes of a kernel: a backward through the old weights must
        raise."""
        if self.reader is not None:
            self.reader.raise_versions()
        else:
            torch.autograd.graph.increment_version(self.params)

    def _fits(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if self.kernel is not None and not self.kernel.matches(params):
            return False
        return layouts(chain(params, grads)) == self._layouts


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
    _check_memory(rows)


def _check_memory(rows: Sequence[TensorRow]) -> None:
    """One launch would write memory that two parameters share from two threads at once."""
    filled = [(row.param, row.param_index) for row in rows if row.param.numel()]
    spans = sorted((p.data_ptr(), p.nbytes, index, p) for p, index in filled)
    for (start, size, index, param), (following, _, other, sharing) in pairwise(spans):
        if start and following < start + size and is_dense(param) and is_dense(sharing):
            raise ValueError(
                f"parameters {index} and {other} share memory, and each would overwrite what the "
                "other has become; make them one parameter (head.weight = embedding.weight, not "
                ".data), or clone one"
            )
