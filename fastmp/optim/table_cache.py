"""The step table of an optimizer, made again when parameters, rules or state were replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastmp.ops.update import TensorRow
from fastmp.ops.update.step_table import StepTable

States = Mapping[Tensor, Mapping[str, Any]]


class TableCache:
    """The table of the last step."""

    def __init__(self) -> None:
        self.table: StepTable | None = None
        self._rules: list[float] = []
        self._state: list[Any] = []
        self._fp16_rows: list[TensorRow] = []
        self._versions: list[int] = []

    def bind(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        rules: list[float],
        states: States,
        make_rows: Callable[[Sequence[float]], list[TensorRow]],
    ) -> StepTable:
        """A table of these parameters, bound to these gradients.

        Args:
            params: those with a gradient.
            grads: one for each.
            rules: one for each parameter group.
            states: the optimizer's state, by parameter.
            make_rows: rules to the rows of a new table.
        """
        table = self.table
        is_current = table is not None and self._is_current(table, params, rules, states)
        if table is None or not is_current or not table.bind_gradients(grads):
            rows = make_rows(rules)
            table = self.table = StepTable(rows, grads)
            self._rules = rules
            self._state = _flat(states)
            self._fp16_rows = [row for row in rows if row.param.dtype == torch.float16]
            self._versions = []
        self._sync_masters()
        return table

    def _is_current(
        self, table: StepTable, params: list[Tensor], rules: list[float], states: States
    ) -> bool:
        if rules != self._rules:
            return False
        held = _flat(states)
        return (
            len(held) == len(self._state)
            and all(map(is_, held, self._state))
            and table.matches(params)
        )

    def _sync_masters(self) -> None:
        """Copy fp16 weights that were written since the last step into their masters.

        Otherwise the next write-back of the master would undo a ``load_state_dict`` or a manual
        edit. A weight that still equals its rounded master keeps the master's finer value. bf16
        needs none of this: there the weight is the upper half of the master.
        """
        versions = [row.param._version for row in self._fp16_rows]
        if versions != self._versions:
            for row in self._fp16_rows:
                assert row.master is not None
                unchanged = row.master.to(torch.float16) == row.param
                row.master.copy_(torch.where(unchanged, row.master, row.param.float()))
        self._versions = [version + 1 for version in versions]  # as the step will leave them


def _flat(states: States) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, states.values())))  # type: ignore[arg-type]
