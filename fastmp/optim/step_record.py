"""The decisions of an optimizer's last step, on the device."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from fastmp.backends.abi import record_field
from fastmp.ops import update
from fastmp.optim.held_state import WatchedState


class RecordedOptimizer(WatchedState):
    """Reads the record (``fastmp_record``) of the last step: device tensors, without a sync."""

    #: Views of a record, with it: to make one takes 2.5 µs.
    _fields: tuple[Tensor | None, dict[str, Tensor]] = (None, {})

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _device(self) -> torch.device:
        """Of the parameters; the CPU for an optimizer without any, on one of many ranks."""
        return next((p.device for p in self._params()), torch.device("cpu"))

    def _record_on(self, device: torch.device) -> Tensor:
        record: Tensor | None = self.__dict__.get("_record")
        if record is None or record.device != device:
            self._record = record = update.new_record(device)
        return record

    def _read(self, name: str) -> Tensor:
        found: Tensor | None = self.__dict__.get("_record")
        record = self._record_on(self._device()) if found is None else found
        of, fields = self._fields
        if of is not record:
            self._fields = _, fields = record, {}
        if name not in fields:
            fields[name] = record_field(record, name)
        return fields[name]

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's unscaled gradients before clipping, 0-d fp32.

        NaN after a step without a scan (``skip_nonfinite=False``, neither clip nor loss scale).
        """
        return self._read("grad_norm")

    @property
    def applied_steps(self) -> Tensor:
        """Number of steps that changed the parameters, 0-d int64."""
        return self._read("applied")

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps that were skipped, 0-d int64."""
        return self._read("skipped")

    @property
    def first_nonfinite(self) -> Tensor:
        """The param_index behind ``nonfinite_param``, -1 for none; 0-d int64."""
        return self._read("first_nonfinite")

    def nonfinite_param(self) -> str | int | None:
        """The first parameter whose gradient was not finite in the last step that saw one.

        Its name if the optimizer was given named parameters, else its position; None if there was
        no such step. Reads the device: on a GPU this waits for it.
        """
        return self.param_name(int(self.first_nonfinite))

    def param_name(self, index: int) -> str | int | None:
        """The name of the parameter at this position, or the position; None for a negative one."""
        if index < 0:
            return None
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return names[index] if names else index
