"""What crosses the boundary of an operation: codes, layouts of ``csrc/common/table.h``, a spec."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}


def unsupported_dtype(*dtypes: torch.dtype) -> str | None:
    """None, or the reason why no kernel takes tensors of these dtypes."""
    for dtype in dtypes:
        if dtype not in DTYPE_CODES:
            return f"no kernel for {dtype}"
    return None


class Master(IntEnum):
    """``fastmp_master``: how a parameter keeps its fp32 value."""

    SELF = 0
    FULL = 1
    SPLIT = 2
    OUTPUT = 3


class StateKind(IntEnum):
    """``fastmp_state_kind``: how the states of a parameter are kept."""

    F32 = 0
    BF16 = 1
    BIT8 = 2


class Activation(IntEnum):
    """``fastmp_activation``: what a linear layer applies to its sums."""

    NONE = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4


ACTIVATION_CODES = {activation.name.lower(): int(activation) for activation in Activation}


class Reduction(IntEnum):
    """``fastmp_reduction``: what becomes of the losses of the rows."""

    NONE = 0
    MEAN = 1
    SUM = 2


REDUCTION_CODES = {reduction.name.lower(): int(reduction) for reduction in Reduction}


class LossSpec(NamedTuple):
    """What defines the loss of logits (N, C), beside the logits.

    Attributes:
        target_a: (N), int64.
        target_b: (N), int64, or None.
        lam: () or (N), weight of ``target_a``; None without ``target_b``.
        weight: (C), class weights, or None.
        ignore_index: rows with this target add nothing, and their gradient is 0.
        reduction: a ``Reduction``.
        smoothing: ε.
    """

    target_a: torch.Tensor
    target_b: torch.Tensor | None
    lam: torch.Tensor | None
    weight: torch.Tensor | None
    ignore_index: int
    reduction: int
    smoothing: float

    def target_error(self, row: int, value: int, classes: int) -> IndexError:
        """The error for a target out of range: ``value``, in ``row``."""
        name = "target" if int(self.target_a[row]) == value else "target_b"
        return IndexError(
            f"Target {value} is out of bounds: expected class indices in [0, {classes}) or "
            f"ignore_index ({self.ignore_index}), got {value} in row {row} of {name}"
        )


#: ``fastmp_row``: one parameter tensor.
ROW = np.dtype(
    [
        ("param", np.int64),
        ("grad", np.int64),
        ("master", np.int64),
        ("state0", np.int64),
        ("state1", np.int64),
        ("state2", np.int64),
        ("scales", np.int64),
        ("average", np.int64),
        ("step", np.int64),
        ("numel", np.int64),
        ("param_index", np.int64),
        ("group", np.uint16),
        ("param_dtype", np.uint8),
        ("grad_dtype", np.uint8),
        ("master_kind", np.uint8),
        ("rule", np.uint8),
        ("state_kind", np.uint8),
        ("reserved", np.uint8),
    ]
)


class Hyperparameters(NamedTuple):
    """``fastmp_hyper``: one parameter group, a row of a float64 matrix."""

    rule: float
    lr: float
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    maximize: float = 0.0
    decoupled: float = 0.0
    nesterov: float = 0.0


LR = Hyperparameters._fields.index("lr")

#: ``fastmp_record``: the decisions of a step.
RECORD = np.dtype(
    [
        ("found_inf", np.float32),
        ("grad_norm", np.float32),
        ("applied", np.int64),
        ("skipped", np.int64),
        ("first_nonfinite", np.int64),
        ("barrier", np.uint32),
        ("done", np.uint32),
    ]
)

#: ``fastmp_chunk``: a part of a row, on a GPU.
CHUNK = np.dtype([("row", np.int32), ("chunk_index", np.int32)])


class Request(Structure):
    """``fastmp_request``: the options of one step."""

    _fields_ = (
        ("grad_scale", c_void_p),
        ("external_found_inf", c_void_p),
        ("max_grad_norm", c_double),
        ("skip_nonfinite_check", c_int64),
        ("schedule", c_void_p),
        ("schedule_rows", c_int64),
        ("ema_decays", c_void_p),
        ("ema_rows", c_int64),
        ("rounding_seed", c_int64),
        ("continues", c_int64),
        ("record", c_void_p),
    )


class StepArgs(Structure):
    """``fastmp_step_args``: the head of the argument of the CUDA kernel."""

    _fields_ = (
        ("rows", c_void_p),
        ("chunks", c_void_p),
        ("partial_sums", c_void_p),
        ("partial_nonfinite_rows", c_void_p),
        ("step_words", c_void_p),
        ("row_count", c_int32),
        ("chunk_count", c_int32),
        ("chunks_per_partial", c_int32),
        ("partial_count", c_int32),
        ("request", Request),
    )


class RingArgs(Structure):
    """``fastmp_ring_args``: the argument of the CUDA loss kernels."""

    _fields_ = (
        ("logits", c_void_p),
        ("row_stride", c_int64),
        ("target_a", c_void_p),
        ("target_b", c_void_p),
        ("lam", c_void_p),
        ("lam_stride", c_int64),
        ("weight", c_void_p),
        ("weight_total", c_void_p),
        ("grad_output", c_void_p),
        ("divisor_partials", c_void_p),
        ("taken", c_void_p),
        ("loss", c_void_p),
        ("total", c_void_p),
        ("stats", c_void_p),
        ("grad", c_void_p),
        ("ignore_index", c_int64),
        ("target_prob", c_float),
        ("smooth_prob", c_float),
        ("lam_value", c_float),
        ("grad_output_value", c_float),
        ("rows", c_int32),
        ("classes", c_int32),
        ("slots", c_int32),
        ("reserved", c_int32),
    )


def record_field(record: torch.Tensor, name: str) -> torch.Tensor:
    """One field of a record (a uint8 tensor of ``RECORD.itemsize`` bytes) as a 0-d tensor view."""
    fields: Any = RECORD.fields
    field, offset = fields[name][:2]
    dtype = {"f": torch.float32, "i": torch.int64}[field.kind]
    return record[offset : offset + field.itemsize].view(dtype)[0]
