"""The tensors of an optimizer step, laid out for the kernel as rows of the multi-tensor table."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cpu, cuda
from fastmp.backends.abi import DTYPE_CODES, ROW, Master
from fastmp.ops.update.rules import RULES

if TYPE_CHECKING:
    from fastmp.backends.cuda.update import Table

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TensorRow(NamedTuple):
    """Everything the step touches of one parameter, but its gradient.

    ``master`` is None for fp32 and fp64 parameters, fp32 for fp16 ones, and int16 for bf16 ones:
    the remainder that makes the weight the full fp32 value. ``states`` has the rule's fp32 states,
    ``step`` how many updates there were, as a 0-d fp32 tensor. All of them share the parameter's
    strides. ``group`` is a row of the hyperparameters, ``number`` the parameter's place in the
    optimizer, ``rule`` the number of the group's rule.
    """

    param: Tensor
    master: Tensor | None
    states: tuple[Tensor, ...]
    step: Tensor
    group: int
    number: int
    rule: int


class StepTable:
    """A step's tensors, laid out for the kernel once and pointed at new gradients every step."""

    def __init__(self, slots: Sequence[TensorRow], grads: Sequence[Tensor]):
        """Lay out the table.

        Raises:
            ValueError: parameters on several devices, or a gradient of another shape or device.
            RuntimeError: a sparse gradient.
        """
        devices = {slot.param.device for slot in slots}
        if len(devices) > 1:
            raise ValueError(
                "expected all parameters of an optimizer on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; use one optimizer per device"
            )
        for slot, grad in zip(slots, grads, strict=True):
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {slot.number} is {grad.layout}: sparse gradients "
                    "are not supported; use sparse=False in the layer, or torch.optim.SparseAdam"
                )
            if grad.shape != slot.param.shape or grad.device != slot.param.device:
                raise ValueError(
                    f"the gradient of parameter {slot.number} does not fit it: expected shape "
                    f"{tuple(slot.param.shape)} on {slot.param.device}, got {tuple(grad.shape)} "
                    f"on {grad.device}; call zero_grad() after changing a parameter"
                )
        self.slots = list(slots)
        self.params = [slot.param for slot in slots]
        self.grads = list(grads)
        self._strides = [p.stride() for p in self.params]
        self._dtypes = [g.dtype for g in grads]
        self.fallback = _why_not_native(slots, grads)
        if self.fallback is None:
            self._grads_at: list[int] = []
            self._params_at = [p.data_ptr() for p in self.params]
            self.rows = _rows(slots, grads)
            self.bind_gradients(grads)
        self.table = self._table() if self.fallback is None else None

    def _table(self) -> Table | None:
        """The table in a GPU's memory; None on the CPU."""
        device = next(iter(self.params)).device if self.params else torch.device("cpu")
        if not is_on_gpu(device):
            return None
        from fastmp.backends.cuda.update import Table

        structs = {slot.rule: RULES[slot.rule].struct for slot in self.slots}
        return Table(self.rows, structs, device)

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are still the parameters the table was laid out for, where it says."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        return self.fallback is not None or [p.data_ptr() for p in params] == self._params_at

    def bind_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Use these gradients, one per row, in the next step; False if the table cannot hold them.

        Then lay out another, which says what is wrong if anything is.
        """
        if self.fallback is not None:
            self.grads = list(grads)
            return all(g.layout == torch.strided for g in grads)
        try:
            grads_at = [g.data_ptr() for g in grads]
        except RuntimeError:  # sparse: there is no one address
            return False
        if grads_at == self._grads_at:
            return True
        if [g.dtype for g in grads] != self._dtypes:
            return False
        self.grads = list(grads)
        if [g.stride() for g in grads] != self._strides:
            # Another order of the same elements (a channels_last weight with a contiguous gradient,
            # say): copied into the weight's order, a slower path with the same result.
            for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
                if grad.stride() != self._strides[i]:
                    self.grads[i] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            grads_at = [g.data_ptr() for g in self.grads]
        self._grads_at = grads_at
        self.rows["grad"] = grads_at
        return True


def is_on_gpu(device: torch.device) -> bool:
    """Whether the CUDA kernel is the one for these tensors."""
    return device.type == "cuda"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _why_not_native(slots: Sequence[TensorRow], grads: Sequence[Tensor]) -> str | None:
    """The reason, in words, why the kernel cannot take these tensors; None if it can."""
    if not slots:
        return None
    device = slots[0].param.device
    if is_on_gpu(device):
        unsupported = None if cuda.load()[0] else cuda.load()[1]
        unsupported = unsupported or cuda.supports_device(device)
        found, reason = unsupported is None, unsupported or ""
    elif device.type == "cpu":
        library, reason = cpu.load()
        found = library is not None
    else:
        found, reason = False, f"no kernel for {device.type}"
    if not found:
        return reason
    for slot, grad in zip(slots, grads, strict=True):
        if slot.param.dtype not in _NATIVE_DTYPES or grad.dtype not in _NATIVE_DTYPES:
            return f"no kernel for {slot.param.dtype} parameters with {grad.dtype} gradients"
        if slot.param.numel() > 0 and not is_dense(slot.param):
            return f"parameter {slot.number} is a strided view with gaps"
    return None


def _rows(slots: Sequence[TensorRow], grads: Sequence[Tensor]) -> np.ndarray:
    rows = np.zeros(len(slots), ROW)
    rows["param"] = [slot.param.data_ptr() for slot in slots]
    rows["master"] = [0 if slot.master is None else slot.master.data_ptr() for slot in slots]
    for i in range(3):
        rows[f"state{i}"] = [
            slot.states[i].data_ptr() if i < len(slot.states) else 0 for slot in slots
        ]
    rows["step"] = [slot.step.data_ptr() for slot in slots]
    rows["numel"] = [slot.param.numel() for slot in slots]
    rows["index"] = [slot.number for slot in slots]
    rows["group"] = [slot.group for slot in slots]
    rows["param_dtype"] = [DTYPE_CODES[slot.param.dtype] for slot in slots]
    rows["grad_dtype"] = [DTYPE_CODES[grad.dtype] for grad in grads]
    rows["rule"] = [slot.rule for slot in slots]
    rows["master_kind"] = [_master_kind(slot.master) for slot in slots]
    return rows


def _master_kind(master: Tensor | None) -> Master:
    if master is None:
        return Master.SELF
    return Master.SPLIT if master.dtype == torch.int16 else Master.FULL
