"""update on the CPU: one call of ``csrc/cpu/update.cpp``."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastmp.backends import cpu, native_table, registry
from fastmp.backends.abi import LR
from fastmp.backends.cpu.structs import UpdateArgs
from fastmp.backends.native_table import Lrs, NativeTable, Options


class CpuStepTable(NativeTable):
    """The tensors of a step in main memory."""

    def step(self, hypers: np.ndarray, record: Tensor, options: Options, lrs: Lrs) -> None:
        """Take a step; arguments as ``ops.update.run``."""
        for group, lr in lrs:
            hypers[group, LR] = float(lr)
        request, _alive = native_table.request(options, record)
        args = UpdateArgs(
            rows=self.rows.ctypes.data,
            row_count=len(self.rows),
            groups=hypers.ctypes.data,
            group_count=len(hypers),
            request=request,
        )
        cpu.call("fastmp_update", args)


registry.register("update", "cpu", CpuStepTable, backend="cpu", supports=native_table.supports)
