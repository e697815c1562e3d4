"""update on the CPU: one call of ``csrc/cpu/update.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastmp.backends import cpu, native_table, registry
from fastmp.backends.abi import LR
from fastmp.backends.cpu.structs import UpdateArgs
from fastmp.backends.native_table import Lrs, NativeTable, Options, TensorRow


class CpuStepTable(NativeTable):
    """The tensors of a step in main memory."""

    def __init__(self, tensor_rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
        super().__init__(tensor_rows, grads)
        self._args = UpdateArgs(rows=self.rows.ctypes.data, row_count=len(self.rows))

    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None:
        """Take a step; arguments as ``ops.update.run``."""
        for group, lr in lrs:
            hypers[group, LR] = float(lr)
        self._args.request, _alive = native_table.request(options, record)
        self._args.groups = hypers.ctypes.data
        self._args.group_count = len(hypers)
        cpu.call("fastmp_update", self._args)
        self.free_copies()


registry.register("update", "cpu", CpuStepTable, backend="cpu", supports=native_table.supports)
