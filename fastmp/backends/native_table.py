"""The multi-tensor table of an optimizer step, as the CPU library and the CUDA kernel read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends.abi import DTYPE_CODES, ROW, Master, Request, StateKind

NO_CLIP = -1.0
Lrs = Sequence[tuple[int, Tensor]]  # parameter groups whose lr is in device memory, with it
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATE_KINDS = {
    torch.float32: StateKind.F32, torch.bfloat16: StateKind.BF16, torch.uint8: StateKind.BIT8
}  # fmt: skip
_data_ptr = Tensor.data_ptr  # mapped over a list: no frame of Python for each tensor


class TensorRow(NamedTuple):
    """The tensors of one parameter, without its gradient, which changes every step.

    Attributes:
        param: the weight.
        master: None for fp32 and fp64 parameters, fp32 for fp16 ones, the int16 remainder that
            completes the weight to an fp32 value for bf16 ones.
        states: as many as the rule has, of one dtype of ``STATE_KINDS``, or fp64; like ``master``
            and ``average`` in the strides of the parameter.
        step: 0-d fp32, the updates of this parameter so far.
        group: row of the hyperparameters.
        param_index: among all parameters of the optimizer.
        rule: number of the group's rule.
        average: moving average of the weight, fp32; None: none is kept.
        scales: of 8-bit states, uint8 (states, blocks of 32); None: they have none.
        direction: receives what the rule makes of gradient and states, 16 bits in the parameter's
            order of elements; the parameter is left to a second pass. None: the rule updates the
            parameter.
    """

    param: Tensor
    master: Tensor | None
    states: tuple[Tensor, ...]
    step: Tensor
    group: int
    param_index: int
    rule: int
    average: Tensor | None = None
    scales: Tensor | None = None
    direction: Tensor | None = None


class Options(NamedTuple):
    """The options of a step; tensors are 0-d fp32 unless stated otherwise.

    Attributes:
        max_grad_norm: clip the global norm of the unscaled gradients to this; negative: no clip.
        grad_scale: the loss scale that the gradients carry.
        external_found_inf: non-zero skips the step: an overflow on another rank, say.
        skip_nonfinite_check: no scan of the gradients unless another option needs one. Saves one
            read; non-finite values reach the weights, as in torch.
        schedule: float64 (steps, 3); lr, momentum and max_grad_norm of the step after k applied
            ones in row k, NaN where unset. With an lr, the groups' own are factors of it.
        ema_decays: float64 (steps), of the averages, by applied steps; the last one from there on.
        rounding_seed: of the random bits that round 16-bit states.
        continues: the second pass of the step that the record describes. Skipped if that was;
            neither counted nor recorded.
    """

    max_grad_norm: float = NO_CLIP
    grad_scale: Tensor | None = None
    external_found_inf: Tensor | None = None
    skip_nonfinite_check: bool = False
    schedule: Tensor | None = None
    ema_decays: Tensor | None = None
    rounding_seed: int = 0
    continues: bool = False


class NativeTable:
    """Rows of the table, laid out once, with the addresses of new gradients every step."""

    def __init__(self, tensor_rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> None:
        self._params = [row.param for row in tensor_rows]
        self._param_ptrs = list(map(_data_ptr, self._params))
        pairs = enumerate(zip(self._params, grads, strict=True))
        self._reordered = [i for i, (param, grad) in pairs if not has_order_of(param, grad)]
        self._copies: list[Tensor] = []
        self._directions = [row.direction for row in tensor_rows if row.direction is not None]
        self.rows = _layout(tensor_rows, grads)
        #: Of the gradients, in the memory that the kernel reads.
        self.addresses: np.ndarray = self.rows["grad"]

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are where they were when the table was laid out."""
        return list(map(_data_ptr, params)) == self._param_ptrs

    def bind_gradients(self, grads: Sequence[Tensor] | None) -> None:
        """Use these gradients, one per row, in the next step; of the layouts of the first ones.

        Only their addresses are kept. None: the parameters' own, whose addresses have been written.
        """
        if grads is not None:
            self.addresses[:] = np.fromiter(map(_data_ptr, grads), np.int64, len(grads))
        for i in self._reordered:
            # Another order of the same elements (a channels_last weight with a contiguous gradient,
            # say): copied into the weight's order, a slower path with the same result.
            grad = self._params[i].grad if grads is None else grads[i]
            assert grad is not None
            copy = torch.empty_like(self._params[i], dtype=grad.dtype).copy_(grad)
            self._copies.append(copy)
            self.addresses[i] = copy.data_ptr()

    def free_copies(self) -> None:
        """After the launch: what is allocated next on its stream comes after it."""
        self._copies.clear()


def supports(rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> str | None:
    """None, or the reason why a table cannot hold these tensors."""
    for row, grad in zip(rows, grads, strict=True):
        if row.param.dtype not in _DTYPES or grad.dtype not in _DTYPES:
            return f"no kernel for {row.param.dtype} parameters with {grad.dtype} gradients"
        if row.param.numel() > 0 and not is_dense(row.param):
            return f"parameter {row.param_index} is a strided view with gaps"
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one contiguous range of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def has_order_of(param: Tensor, grad: Tensor) -> bool:
    """Whether the elements of a gradient lie in memory in the order of its parameter's.

    Dimensions of size 1 do not count: the strides of a 1x1 convolution's under channels_last. The
    memory of a view like the imaginary part of a conjugate has the other sign.
    """
    if grad.is_neg():
        return False
    strides = zip(param.shape, param.stride(), grad.stride(), strict=True)
    return param.numel() == 0 or all(a == b for size, a, b in strides if size > 1)


def _layout(rows: Sequence[TensorRow], grads: Sequence[Tensor]) -> np.ndarray:
    table = np.zeros(len(rows), ROW)
    written = [row.param if row.direction is None else row.direction for row in rows]
    masters = [row.master if row.direction is None else None for row in rows]
    table["param"] = list(map(_data_ptr, written))
    table["master"] = [0 if master is None else master.data_ptr() for master in masters]
    for i in range(3):
        table[f"state{i}"] = [
            row.states[i].data_ptr() if i < len(row.states) else 0 for row in rows
        ]
    table["scales"] = [0 if row.scales is None else row.scales.data_ptr() for row in rows]
    table["average"] = [0 if row.average is None else row.average.data_ptr() for row in rows]
    table["step"] = [row.step.data_ptr() for row in rows]
    table["numel"] = [row.param.numel() for row in rows]
    table["param_index"] = [row.param_index for row in rows]
    table["group"] = [row.group for row in rows]
    table["param_dtype"] = [DTYPE_CODES[tensor.dtype] for tensor in written]
    table["grad_dtype"] = [DTYPE_CODES[grad.dtype] for grad in grads]
    table["rule"] = [row.rule for row in rows]
    table["state_kind"] = [STATE_KINDS[row.states[0].dtype] if row.states else 0 for row in rows]
    table["master_kind"] = [_master_kind(row) for row in rows]
    return table


def _master_kind(row: TensorRow) -> Master:
    if row.direction is not None:
        return Master.OUTPUT
    if row.master is None:
        return Master.SELF
    return Master.SPLIT if row.master.dtype == torch.int16 else Master.FULL


def request(options: Options, record: Tensor) -> tuple[Request, list[Tensor | None]]:
    """The options as the kernels read them, and the tensors that the request points to."""
    device = record.device
    scale, found_inf = (_fp32(t, device) for t in (options.grad_scale, options.external_found_inf))
    schedule, decays = options.schedule, options.ema_decays
    made = Request(
        grad_scale=_address(scale),
        external_found_inf=_address(found_inf),
        max_grad_norm=options.max_grad_norm,
        skip_nonfinite_check=options.skip_nonfinite_check,
        schedule=_address(schedule),
        schedule_rows=0 if schedule is None else len(schedule),
        ema_decays=_address(decays),
        ema_rows=0 if decays is None else len(decays),
        rounding_seed=options.rounding_seed,
        continues=options.continues,
        record=record.data_ptr(),
    )
    return made, [scale, found_inf, schedule, decays, record]


def _fp32(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None or (value.dtype == torch.float32 and value.device == device):
        return value
    return value.detach().to(device, torch.float32, non_blocking=True)


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()
