"""update on a GPU: the table in device memory, and the one launch of ``csrc/cuda/update.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmp.backends.abi import HYPER_FIELDS, UNIT, Master, Request, Work
from fastmp.backends.cuda import launch

_UNIT = 1024  # kUnit of update.cu
_SPANS = 2048  # a norm is summed up in at most so many parts, whatever the GPU
_C_TYPES = ("float", "fastmp::f16", "fastmp::bf16")  # by fastmp_dtype
_LR = HYPER_FIELDS.index("lr")

#: What captured graphs read when they are replayed, for as long as the process lives: nobody can
#: know how long a graph does. 80 bytes a tensor for every capture.
_captured: list[Any] = []


def case_of(struct: str, param: int, grad: int, master: int) -> str:
    """``Case`` of update.cu for a rule's struct, two dtypes and a master, all by number."""
    kept = f"FASTMP_{Master(master).name}"
    return f"fastmp::Case<fastmp::{struct}, {_C_TYPES[param]}, {_C_TYPES[grad]}, {kept}>"


class Table:
    """A step's tensors in device memory.

    Rows and hyperparameters are one piece of memory, uploaded by one asynchronous copy, and only
    when a byte of it has changed. The units never change.
    """

    def __init__(self, rows: np.ndarray, structs: dict[int, str], device: torch.device) -> None:
        """Lay out the work; ``rows`` is read again at every step.

        Args:
            rows: of ``table.ROW``.
            structs: the struct in rules.h of every rule number among the rows.
            device: where the tensors are.
        """
        columns = ("rule", "param_dtype", "grad_dtype", "master_kind")
        kinds = sorted(set(zip(*(rows[name].tolist() for name in columns), strict=True)))
        cases = tuple(case_of(structs[rule], *kept) for rule, *kept in kinds)
        self.device = device
        self.kernel = launch.kernel(cases, device)
        self._rows = rows
        self._uploaded = b""
        self._image: Tensor | None = None
        units = _units(rows["numel"])
        a_span = max(1, -(-len(units) // _SPANS))
        self._units = torch.empty(max(1, units.nbytes), dtype=torch.uint8, device=device)
        if len(units):
            self._units.copy_(torch.from_numpy(units.view(np.uint8)))
        self._sums = torch.empty(_SPANS, dtype=torch.float64, device=device)
        self._offenders = torch.empty(_SPANS, dtype=torch.int32, device=device)
        self._blocks = max(1, min(self.kernel.most_blocks, len(units)))
        self._work = Work(
            units=self._units.data_ptr(),
            sums=self._sums.data_ptr(),
            offenders=self._offenders.data_ptr(),
            row_count=len(rows),
            unit_count=len(units),
            units_per_span=a_span,
            span_count=-(-len(units) // a_span),
        )
        # Page-locked memory cannot be asked for during a capture: there is some for the next one.
        self._spare: Tensor | None = None

    def step(
        self,
        hypers: np.ndarray,
        request: Request,
        lrs: Sequence[tuple[int, Tensor]],
        kept: Sequence[Tensor | None],
    ) -> None:
        """Launch a step.

        Args:
            hypers: float64 (groups, 10).
            request: pointers into the device's memory.
            lrs: groups whose lr is a tensor on the device, with it: read when the step runs.
            kept: what ``request`` points to; a graph needs it as long as it lives.
        """
        image = hypers.tobytes() + self._rows.tobytes()
        if self._spare is None or self._spare.numel() != len(image):
            self._spare = self.kernel.host_memory(len(image))
        if self.kernel.is_capturing():
            host, self._spare = self._spare, None
            device = torch.empty(len(image), dtype=torch.uint8, device=self.device)
            _fill(host, image)
            self.kernel.copy(host, device)
            _captured.append((self, host, device, *kept))
        else:
            device = self._current(image)
        groups = device[: hypers.nbytes].view(torch.float64).view(hypers.shape)
        for group, lr in lrs:
            groups[group, _LR].copy_(lr)
        self._work.groups = device.data_ptr()
        self._work.rows = device.data_ptr() + hypers.nbytes
        self._work.request = request
        self.kernel.launch(self._blocks, self._work)

    def _current(self, image: bytes) -> Tensor:
        """The table in device memory, uploaded if it has changed."""
        if self._image is None or self._image.numel() != len(image):
            self._image = torch.empty(len(image), dtype=torch.uint8, device=self.device)
            self._uploaded = b""
        if image != self._uploaded:
            host = self.kernel.host_memory(len(image))
            _fill(host, image)
            self._image.copy_(host, non_blocking=True)
            self._uploaded = image
        return self._image


def _fill(host: Tensor, image: bytes) -> None:
    host.numpy()[:] = np.frombuffer(image, np.uint8)


def _units(sizes: np.ndarray) -> np.ndarray:
    """The work, 1,024 elements of a row at a time."""
    counts = -(-sizes // _UNIT)
    units = np.empty(int(counts.sum()), UNIT)
    units["row"] = np.repeat(np.arange(len(sizes)), counts)
    units["place"] = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    return units
