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
        self._held = HeldState({})
        self.remainders = Remainders(split_fp16)

    def bind(
        self,
        optimizer: FusedOptimizer,
        params: list[Tensor],
        grads: list[Tensor],
        rules: list[float],
    ) -> StepTable:
        """A table of ``params`` bound to their ``grads``; ``rules``: one for each group."""
        table = self.table
        if (
            table is None
            or rules != self._rules
            or (optimizer._state_is_shared and not self._held.is_unchanged(optimizer._own_state))
            or not table.bind(params, grads)
        ):
            rows = optimizer._prepare_rows(_rows(optimizer, rules))
            table = self.table = StepTable(rows, grads)
            self._rules = rules
            self._held = HeldState(optimizer._own_state)
            masters = [(r.param, r.master) for r in rows if r.master is not None]
            split = [(p, m) for p, m in masters if m.dtype == torch.int16]
            self.remainders.use([p for p, _ in split], [m for _, m in split])
        self.remainders.drop_stale()
        return table


def _rows(optimizer: FusedOptimizer, rules: list[float]) -> list[TensorRow]:
    """The rows of a new table; allocates state that a parameter lacks."""
    all_states = optimizer._own_state
    state.adopt_masters(all_states, optimizer._params(), optimizer._tables.remainders)
    split = optimizer._tables.remainders.split_fp16
    rows: list[TensorRow] = []
    param_index = 0
    for i, group in enumerate(optimizer.param_groups):
        keys = optimizer._state_keys(group)
        params = [p for p in group["params"] if p.grad is not None]
        averaged = optimizer._ema is not None
        state.allocate(all_states, params, keys, optimizer._kind, split=split, average=averaged)
        for param in group["params"]:
            if param.grad is not None:
                own = all_states[param]
                state.normalize(own, param, keys, optimizer._kind)
                master = own.get(state.master_key(param, split) or "")
                states = tuple(own[key] for key in keys)
                rule = int(rules[i])
                average = own["average"] if averaged else None
                place = (own["step"], i, param_index, rule)
                row = TensorRow(param, master, states, *place, average, own.get("scales"))
                rows.append(row)
            param_index += 1
    return rows
