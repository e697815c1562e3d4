"""update on a GPU: the table in device memory, and the one launch of ``csrc/cuda/update.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cuda, native_table, registry
from fastmp.backends.abi import CHUNK, LR, Master, StateKind, StepArgs
from fastmp.backends.cuda import launch, nvrtc
from fastmp.backends.native_table import Lrs, NativeTable, Options, TensorRow

MAX_PARTIALS = 2048  # of a norm, whatever the GPU
_C_TYPES = ("float", "fastmp::f16", "fastmp::bf16")  # by fastmp_dtype
_STATES = {StateKind.F32: "StateF32", StateKind.BF16: "StateBf16", StateKind.BIT8: "State8Bit"}

#: Memory that captured graphs read when they are replayed, kept as long as the process lives: the
#: end of a graph cannot be observed. 96 bytes a tensor and 8 a chunk for every capture; no weight.
_captured: list[Any] = []


def case_of(
    rule: int, param: int, grad: int, master: int, state: int = 0, averaged: bool = False
) -> str:
    """``Case`` of update.cu.

    Args:
        rule: its number.
        param, grad: codes of dtypes.
        master: a ``Master``.
        state: a ``StateKind``.
        averaged: whether an average of the weight is kept.
    """
    dtypes = f"{_C_TYPES[param]}, {_C_TYPES[grad]}"
    kept = f"FASTMP_{Master(master).name}, fastmp::{_STATES[StateKind(state)]}"
    average = "true" if averaged else "false"
    return f"fastmp::Case<fastmp::RuleOf<{rule}>::Rule, {dtypes}, {kept}, {average}>"


class CudaStepTable(NativeTable):
    """The tensors of a step, with its table in device memory.

    Rows and hyperparameters are one piece of memory, uploaded by one asynchronous copy, and only
    when a byte of it has changed. The chunks never change.
    """

    def __init__(self, tensor_rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
        super().__init__(tensor_rows, grads)
        names = ("rule", "param_dtype", "grad_dtype", "master_kind", "state_kind")
        columns = [self.rows[name].tolist() for name in names]
        kinds = set(zip(*columns, (self.rows["average"] != 0).tolist(), strict=True))
        self.device = tensor_rows[0].param.device
        self.kernel = launch.kernel(tuple(case_of(*kind) for kind in sorted(kinds)), self.device)
        self._uploaded = b""
        self._image: Tensor | None = None
        chunks = _chunks(self.rows["numel"])
        per_partial = max(1, -(-len(chunks) // MAX_PARTIALS))
        self._chunks = torch.empty(max(1, chunks.nbytes), dtype=torch.uint8, device=self.device)
        if len(chunks):
            self._chunks.copy_(torch.from_numpy(chunks.view(np.uint8)))
        self._sums = torch.empty(MAX_PARTIALS, dtype=torch.float64, device=self.device)
        self._nonfinite_rows = torch.empty(MAX_PARTIALS, dtype=torch.int32, device=self.device)
        self._blocks = max(1, min(self.kernel.max_blocks, len(chunks)))
        self._args = StepArgs(
            chunks=self._chunks.data_ptr(),
            partial_sums=self._sums.data_ptr(),
            partial_nonfinite_rows=self._nonfinite_rows.data_ptr(),
            row_count=len(self.rows),
            chunk_count=len(chunks),
            chunks_per_partial=per_partial,
            partial_count=-(-len(chunks) // per_partial),
        )
        # Page-locked memory cannot be allocated during a capture: this is for the next one.
        self._spare: Tensor | None = None

    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None:
        """Launch a step; arguments as ``ops.update.run``. ``lrs`` are read when the step runs."""
        request, alive = native_table.request(options, record)
        image = hypers.tobytes() + self.rows.tobytes()
        if self._spare is None or self._spare.numel() != len(image):
            self._spare = self.kernel.host_memory(len(image))
        if self.kernel.is_capturing():
            host, self._spare = self._spare, None
            table = torch.empty(len(image), dtype=torch.uint8, device=self.device)
            _fill(host, image)
            self.kernel.copy(host, table)
            scratch = (self._chunks, self._sums, self._nonfinite_rows)
            _captured.append((host, table, *scratch, *alive, *self._directions))
        else:
            table = self._current(image)
        if lrs:
            groups = table[: hypers.nbytes].view(torch.float64).view(hypers.shape)
            for group, lr in lrs:
                groups[group, LR].copy_(lr)
        self._args.groups = table.data_ptr()
        self._args.rows = table.data_ptr() + hypers.nbytes
        self._args.request = request
        self.kernel.launch(self._blocks, self._args)
        self.free_copies()

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
    ctypes.memmove(host.data_ptr(), image, len(image))


def _chunks(sizes: np.ndarray) -> np.ndarray:
    """The rows, each in chunks of ``nvrtc.CHUNK_SIZE`` elements."""
    counts = -(-sizes // nvrtc.CHUNK_SIZE)
    chunks = np.empty(int(counts.sum()), CHUNK)
    chunks["row"] = np.repeat(np.arange(len(sizes)), counts)
    chunks["chunk_index"] = np.arange(len(chunks)) - np.repeat(np.cumsum(counts) - counts, counts)
    return chunks


def _supports(rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> str | None:
    return cuda.supports_device(rows[0].param.device) or native_table.supports(rows, grads)


registry.register("update", "cuda", CudaStepTable, backend="cuda", supports=_supports)
