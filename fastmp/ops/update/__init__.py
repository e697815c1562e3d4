"""update: one optimizer step over many tensors, in one call.

    found_inf = any gradient not finite        norm = || grad / scale ||
    unless found_inf:
        g      = grad / scale * min(1, max_norm / (norm + 1e-6))
        master = rule(master, g)               weight = round(master)

The rules are those of ``csrc/common/rules.h``, which holds them for the kernels, and of
``fastmp.optim``, which holds them in plain PyTorch: the oracle of the tests, and the fallback for
dtypes and devices without a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cpu, registry
from fastmp.backends.abi import RECORD, Request, record_field
from fastmp.backends.cpu.structs import UpdateArgs
from fastmp.ops.update.rules import RULES, Hyperparameters
from fastmp.ops.update.step_table import StepTable, TensorRow

NO_CLIP = -1.0
_LR = Hyperparameters._fields.index("lr")


class Options(NamedTuple):
    """What is asked of a step; tensors are 0-d fp32 unless it says something else.

    ``max_grad_norm``: clip the global norm of the unscaled gradients to this; negative: do not.
    ``grad_scale``: the loss scale that the gradients carry.
    ``found_inf``: non-zero if somebody else saw an overflow (another rank, a scaler).
    ``unchecked``: unless there is a norm to clip to, a scale or a found_inf, do not look at the
    gradients first. One pass over them less; one that is not finite goes in, as in torch.
    ``schedule``: float64 (steps, 3), the lr, the momentum and the max_grad_norm of the step after k
    applied ones in row k, NaN where it says nothing; every group's lr is then a factor.
    """

    max_grad_norm: float = NO_CLIP
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    unchecked: bool = False
    schedule: Tensor | None = None


def new_record(device: torch.device) -> Tensor:
    """A zeroed ``fastmp_record``: read it through ``backends.table.record_field``."""
    record = torch.zeros(RECORD.itemsize, dtype=torch.uint8, device=device)
    record_field(record, "first_nonfinite").fill_(-1)
    return record


# ---- split masters ----


def split_master(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as (bf16 weight, int16 remainder); see ``csrc/common/numerics.h``."""
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    weight = (bits + 0x8000) >> 16
    return weight.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that a bf16 weight and its int16 remainder stand for, to the bit."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder).view(torch.float32)


# ---- running a step ----


def run(
    plan: StepTable,
    hypers: np.ndarray,
    record: Tensor,
    options: Options | None = None,
    lrs: Sequence[tuple[int, Tensor]] = (),
) -> None:
    """Take one step with every tensor of the plan.

    Args:
        plan: the tensors; parameters, masters, states and steps are changed in place, or, if any
            gradient is not finite, not at all.
        hypers: float64 (groups, 10), one ``Hyperparameters`` per row.
        record: what was decided; see ``new_record``.
        options: what is asked of the step; None: nothing out of the ordinary.
        lrs: groups whose lr is a tensor on a GPU, with it; what ``hypers`` has there is ignored.
    """
    options = options or Options()
    blind = options.max_grad_norm < 0 and options.grad_scale is None and options.found_inf is None
    options = options._replace(unchecked=options.unchecked and blind)
    if plan.fallback is not None:
        for group, lr in lrs:
            hypers[group, _LR] = float(lr)
        _reference(plan, hypers, record, options)
        return
    request, kept = _request(options, record)
    if plan.table is not None:
        plan.table.step(hypers, request, lrs, kept)
        return
    args = UpdateArgs(
        rows=plan.rows.ctypes.data,
        row_count=len(plan.rows),
        groups=hypers.ctypes.data,
        group_count=len(hypers),
        request=request,
    )
    cpu.call("fastmp_update", args)


def _request(options: Options, record: Tensor) -> tuple[Request, list[Tensor | None]]:
    """The options as the kernels read them, and the tensors they are read from."""
    device = record.device
    scale, found = (_fp32(t, device) for t in (options.grad_scale, options.found_inf))
    schedule = options.schedule
    request = Request(
        grad_scale=_address(scale),
        found_inf=_address(found),
        max_grad_norm=options.max_grad_norm,
        unchecked=options.unchecked,
        schedule=_address(schedule),
        schedule_rows=0 if schedule is None else len(schedule),
        record=record.data_ptr(),
    )
    return request, [scale, found, schedule, record]


def _fp32(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.detach().to(device, torch.float32, non_blocking=True)


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def clip(norm: Tensor, limit: float) -> Tensor:
    """What gradients of a norm are multiplied by, as in ``torch.nn.utils.clip_grad_norm_``."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


# ---- the reference ----


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scheduled(
    hyper: Hyperparameters, options: Options, applied: int
) -> tuple[Hyperparameters, float]:
    """The hyperparameters of this step, and the norm to clip to."""
    if options.schedule is None:
        return hyper, options.max_grad_norm
    row = options.schedule[min(applied, len(options.schedule) - 1)]
    lr, momentum, limit = row.tolist()
    hyper = hyper._replace(lr=hyper.lr * lr if lr == lr else hyper.lr)
    hyper = hyper._replace(beta1=momentum if momentum == momentum else hyper.beta1)
    return hyper, limit if limit == limit else options.max_grad_norm


@torch.no_grad()
def _reference(plan: StepTable, hypers: np.ndarray, record: Tensor, options: Options) -> None:
    applied = 0 if options.schedule is None else int(record_field(record, "applied"))
    limits = [_scheduled(Hyperparameters(*row), options, applied) for row in hypers.tolist()]
    limit = limits[0][1] if limits else options.max_grad_norm
    norm, unscale, skip = _judge(plan, record, options, limit)
    if not skip:
        factor = float(clip(norm, limit)) if limit >= 0 else 1.0
        for slot, grad in zip(plan.slots, plan.grads, strict=True):
            _update(slot, grad, unscale * factor, limits[slot.group][0])
    record_field(record, "found_inf").fill_(float(skip))
    record_field(record, "skipped" if skip else "applied").add_(1)


def _judge(
    plan: StepTable, record: Tensor, options: Options, limit: float
) -> tuple[Tensor, float, bool]:
    """(norm of the unscaled gradients, factor that unscales, whether to skip the step)."""
    scale = 1.0 if options.grad_scale is None else float(options.grad_scale)
    usable = bool(np.isfinite(scale)) and scale != 0.0
    unscale = 1.0 / scale if usable else 1.0
    trusted = options.unchecked and limit < 0
    bad = [not trusted and not bool(grad.isfinite().all()) for grad in plan.grads]
    # hypot over the tensors' norms: the squares of fp64 gradients may not fit
    norms = [float((_wide(grad).double() * unscale).norm()) for grad in plan.grads]
    norm = torch.tensor(norms, dtype=torch.float64).norm()
    record_field(record, "grad_norm").fill_(np.nan if trusted else float(norm))
    if any(bad):
        record_field(record, "first_nonfinite").fill_(plan.slots[bad.index(True)].number)
    told = options.found_inf is not None and float(options.found_inf) != 0.0
    return norm, unscale, any(bad) or told or not usable


def _update(slot: TensorRow, grad: Tensor, factor: float, h: Hyperparameters) -> None:
    g = _wide(grad) * (factor * (-1 if h.maximize else 1))
    slot.step.add_(1)
    master = slot.master
    if master is None:
        old = slot.param
    else:
        old = join_master(slot.param, master) if master.dtype == torch.int16 else master
    new = RULES[int(h.rule)].reference(old, g, slot.states, float(slot.step), h)
    if master is None:
        slot.param.copy_(new)
    elif master.dtype == torch.int16:
        weight, remainder = split_master(new)
        slot.param.copy_(weight)
        master.copy_(remainder)
    else:
        master.copy_(new)
        slot.param.copy_(new)


registry.announce("update", "cpu", "cpu")
registry.announce("update", "cuda", "cuda")
