"""Averages of the weights that the update moves along: one more fp32 state of a parameter.

    average += (1 - decay) (weight - average)        in every step that changes the weight

The weight is the fp32 master: a 16-bit average would stand still, for with decay 0.999 each change
is below half a unit in the last place of bf16. The first step of a parameter copies its weight, as
``torch.optim.swa_utils.AveragedModel`` does. The decays lie in a table on the parameters' device,
read by the number of applied steps: skipped steps leave the averages to the bit, and a replayed
CUDA graph follows a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmp.optim import state
from fastmp.optim.saved import SavedOptimizer

#: A decay; one for each applied step, the last one from there on; or a function of them.
Ema = float | Sequence[float] | Callable[[int], float]

#: Entries that a function without a ``length`` is evaluated for: 800 KB.
MAX_ENTRIES = 100_000


def decay_table(ema: Ema) -> Tensor:
    """The decays by applied steps, float64.

    Raises:
        ValueError: no decay, or one outside [0, 1).
    """
    expected = "ema: expected a decay in [0, 1), or a sequence or function of them by applied steps"
    try:
        if callable(ema):
            ema = [float(ema(step)) for step in range(getattr(ema, "length", None) or MAX_ENTRIES)]
        table = torch.as_tensor(ema, dtype=torch.float64, device="cpu").reshape(-1).clone()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {ema!r}: {error}") from error
    inside = (table >= 0) & (table < 1)
    if not len(table) or not bool(inside.all()):
        bad = table[~inside][:1].tolist() or ["none"]
        raise ValueError(f"{expected}, got {bad[0]}")
    return table


class AveragedOptimizer(SavedOptimizer):
    """An optimizer with averages of its parameters."""

    @property
    def ema(self) -> float | tuple[float, ...] | None:
        """The decay of the averages, or those of the applied steps; None: there are none.

        May be set between two steps: averages that are new begin at the weights. Capture graphs
        after that.
        """
        if self._ema is None:
            return None
        decays = tuple(self._ema.tolist())
        return decays[0] if len(decays) == 1 else decays

    @ema.setter
    def ema(self, value: Ema | None) -> None:
        table = None if value is None else decay_table(value)
        if (table is None) != (self._ema is None):
            self._tables.table = None
            if table is None:
                for own in self._own_state.values():
                    own.pop("average", None)
        self._ema = table

    def _ema_on(self, device: torch.device) -> Tensor | None:
        if self._ema is not None and self._ema.device != device:
            self._ema = self._ema.to(device)
        return self._ema

    def averages(self) -> list[Tensor]:
        """The averages, fp32 (fp64 of fp64), copies in the order of ``masters``.

        That of a parameter that was in no applied step yet is its value; a parameter without a
        gradient in a step keeps its average in it.

        Raises:
            ValueError: this optimizer keeps none.
        """
        self._require_average()
        averages = self.masters()
        for i, param in self._stepped().items():
            average = self._own_state[param].get("average")
            if average is not None:
                averages[i] = average.clone()
        return averages

    @torch.no_grad()
    def load_averages(self, values: Sequence[Tensor]) -> None:
        """Continue from these averages, in the order and shapes of ``averages``.

        Raises:
            ValueError: this optimizer keeps none, another number of values, one of another shape,
                or one that is not the weight of a parameter that was in no applied step yet: the
                first one would replace it. Nothing has changed then.
        """
        self._require_average()
        params = self._params()
        state.check_shapes(values, params)
        stepped, own = self._stepped(), self._own_state
        for i, (param, value) in enumerate(zip(params, values, strict=True)):
            if i not in stepped and not bool((value.to(param) == param).all()):
                raise ValueError(
                    f"parameter {i} was in no step yet, and its first one sets the average to the "
                    "weight, as in AveragedModel: load the optimizer's state before its averages"
                )
        for i, param in stepped.items():
            if "average" not in own[param]:
                own[param]["average"] = torch.empty_like(state.master_of(param, own[param]))
            own[param]["average"].copy_(values[i])

    def _stepped(self) -> dict[int, Tensor]:
        """The parameters that were in an applied step, by their places."""
        own = self._own_state
        return {
            i: p for i, p in enumerate(self._params()) if float(own.get(p, {}).get("step", 0)) > 0
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block the parameters are their averages; afterwards themselves, to the bit.

        Raises:
            ValueError: this optimizer keeps no averages.
            RuntimeError: inside, a step, or anything that reads or sets masters or state.
        """
        averages = self.averages()
        params = self._params()
        own = [param.detach().clone() for param in params]
        _write(params, averages)
        self._averages_are_in = True
        try:
            yield
        finally:
            self._averages_are_in = False
            _write(params, own)

    def _require_average(self) -> None:
        if self._ema is None:
            raise ValueError("this optimizer keeps no averages: expected it to be made with ema=")


@torch.no_grad()
def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        # .data: a write that raised the version would drop the remainders of bf16 weights
        param.data.copy_(value)
