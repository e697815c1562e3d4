"""The step table of an optimizer, made again when parameters, rules or state were replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmp.ops.update import TensorRow
from fastmp.ops.update.step_table import StepTable
from fastmp.optim import state
from fastmp.optim.held_state import HeldState
from fastmp.optim.remainders import Remainders

if TYPE_CHECKING:
    from fastmp.optim.base import FusedOptimizer


class TableCache:
    """The table of the last step."""

    def __init__(self, split_fp16: bool = False) -> None:
        self.table: StepTable | None = None
        self._rules: list[float] = []
        self._sizes: list[int] = []  # of the groups
        self._held = HeldState({})
        self._version_sum: int | None = None  # of the parameters, unless one was changed since
        self.remainders = Remainders(split_fp16)

    def rebind(self, optimizer: FusedOptimizer, rules: list[float]) -> StepTable | None:
        """The table of the last step, bound to the gradients that there are now.

        None: collect them and call ``bind``.
        """
        table = self.table
        if table is None or table.reader is None or self._is_outdated(optimizer, rules):
            return None
        if not table.rebind([group["params"] for group in optimizer.param_groups]):
            return None
        versions = table.reader.version_sum
        if versions != self._version_sum:
            self.remainders.drop_stale()
        self._version_sum = versions + len(table.params)  # every version after this step
        return table

    def bind(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        grads: list[Tensor],
        rules: list[float],
    ) -> StepTable:
        """A table of ``params`` bound to their ``grads``; ``rules``: one for each group."""
        table, groups = self.table, [group["params"] for group in optimizer.param_groups]
        sizes = list(map(len, groups))
        if (
            table is None
            or sizes != self._sizes
            or self._is_outdated(optimizer, rules)
            or not table.bind(params, grads)
        ):
            rows = optimizer._prepare_rows(_rows(optimizer, rules))
            table = self.table = StepTable(rows, grads, groups)
            self._rules, self._sizes = rules, sizes
            self._held = HeldState(optimizer._own_state)
            masters = [(r.param, r.master) for r in rows if r.master is not None]
            split = [(p, m) for p, m in masters if m.dtype == torch.int16]
            self.remainders.use([p for p, _ in split], [m for _, m in split])
        self._version_sum = None
        self.remainders.drop_stale()
        return table

    def _is_outdated(self, optimizer: FusedOptimizer, rules: list[float]) -> bool:
        if rules != self._rules:
            return True
        shared = optimizer._state_is_shared
        return shared and not self._held.is_unchanged(optimizer._own_state)


def _rows(optimizer: FusedOptimizer, rules: list[float]) -> list[TensorRow]:
    """The rows of a new table; allocates state that a parameter lacks."""
    all_states, remainders = optimizer._own_state, optimizer._tables.remainders
    state.adopt_masters(all_states, optimizer._params(), remainders)
    rows: list[TensorRow] = []
    param_index = 0
    for i, group in enumerate(optimizer.param_groups):
        keys = optimizer._state_keys(group)
        params = [p for p in group["params"] if p.grad is not None]
        averaged = optimizer._ema is not None
        state.allocate(all_states, params, keys, optimizer._kind, split=remainders.split_fp16)
        for param in group["params"]:
            if param.grad is not None:
                own = all_states[param]
                if averaged and own.get("average") is None:
                    valid = remainders.valid_state(param, own)
                    own["average"] = state.master_of(param, valid).clone()
                state.normalize(own, param, keys, optimizer._kind)
                master = own.get(state.master_key(param, remainders.split_fp16) or "")
                states = tuple(own[key] for key in keys)
                rule = int(rules[i])
                average = own["average"] if averaged else None
                place = (own["step"], i, param_index, rule)
                row = TensorRow(param, master, states, *place, average, own.get("scales"))
                rows.append(row)
            param_index += 1
    return rows
