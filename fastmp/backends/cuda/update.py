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

    Rows and chunks are uploaded once. Hyperparameters and addresses of gradients, the words of a
    step, lie in the argument of the launch if they fit; else, or if an lr is in device memory, they
    are one piece of device memory, uploaded by one asynchronous copy when a byte has changed.
    """

    def __init__(self, tensor_rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
        super().__init__(tensor_rows, grads)
        names = ("rule", "param_dtype", "grad_dtype", "master_kind", "state_kind")
        columns = [self.rows[name].tolist() for name in names]
        kinds = set(zip(*columns, (self.rows["average"] != 0).tolist(), strict=True))
        self.device = tensor_rows[0].param.device
        self.kernel = launch.kernel(tuple(case_of(*kind) for kind in sorted(kinds)), self.device)
        chunks = _chunks(self.rows["numel"])
        per_partial = max(1, -(-len(chunks) // MAX_PARTIALS))
        fixed = np.concatenate([self.rows.view(np.uint8), chunks.view(np.uint8)])
        self._fixed = torch.empty(len(fixed), dtype=torch.uint8, device=self.device)
        self._fixed.copy_(torch.from_numpy(fixed))
        self._sums = torch.empty(MAX_PARTIALS, dtype=torch.float64, device=self.device)
        self._nonfinite_rows = torch.empty(MAX_PARTIALS, dtype=torch.int32, device=self.device)
        head, room = ctypes.sizeof(StepArgs) // 8, self.kernel.words
        argument = np.zeros(head + room, np.int64)
        self._args, self._words = StepArgs.from_buffer(argument.data), argument[head:]
        self._args.rows = self._fixed.data_ptr()
        self._args.chunks = self._fixed.data_ptr() + self.rows.nbytes
        self._args.partial_sums = self._sums.data_ptr()
        self._args.partial_nonfinite_rows = self._nonfinite_rows.data_ptr()
        self._args.row_count, self._args.chunk_count = len(self.rows), len(chunks)
        self._args.chunks_per_partial = per_partial
        self._args.partial_count = -(-len(chunks) // per_partial)
        blocks = max(1, min(self.kernel.max_blocks, len(chunks)))
        self._launch = self.kernel.prepare(blocks, self._args)
        fits = len(self.rows) <= room
        own = self._words[: len(self.rows)] if fits else np.empty(len(self.rows), np.int64)
        self.addresses = own
        self._uploaded = b""
        self._image: Tensor | None = None
        # Page-locked memory cannot be allocated during a capture: this is for the next one.
        self._spare: Tensor | None = None

    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None:
        """Launch a step; arguments as ``ops.update.run``. ``lrs`` are read when the step runs."""
        self._args.request, alive = native_table.request(options, record)
        captured = self.kernel.is_capturing()
        rows, words = len(self.rows), len(self.rows) + hypers.size
        if lrs or words > len(self._words):
            image = self.addresses.tobytes() + hypers.tobytes()
            table = self._uploaded_for_graph(image) if captured else self._current(image)
            groups = table[8 * rows :].view(torch.float64).view(hypers.shape)
            for group, lr in lrs:
                groups[group, LR].copy_(lr)
            self._args.step_words = table.data_ptr()
        else:
            self._words[rows:words] = hypers.view(np.int64).reshape(-1)
            self._args.step_words = None
        if captured:
            scratch = (self._fixed, self._sums, self._nonfinite_rows)
            _captured.append((*scratch, *alive, *self._directions))
        self._launch()
        self.free_copies()

    def _uploaded_for_graph(self, image: bytes) -> Tensor:
        """Device memory of its own, into which a captured graph uploads the image."""
        host, self._spare = self._spare, None
        table = torch.empty(len(image), dtype=torch.uint8, device=self.device)
        if host is None or host.numel() != len(image):
            host = self.kernel.host_memory(len(image))
        _fill(host, image)
        self.kernel.copy(host, table)
        _captured.append((host, table))
        return table

    def _current(self, image: bytes) -> Tensor:
        """The image in device memory, uploaded if it has changed."""
        if self._spare is None or self._spare.numel() != len(image):
            self._spare = self.kernel.host_memory(len(image))
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
