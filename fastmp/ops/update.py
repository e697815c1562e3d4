"""update: one optimizer step over many tensors, in one call.

    found_inf = any gradient not finite        norm = || grad / scale ||
    unless found_inf:
        g      = grad / scale * min(1, max_norm / (norm + 1e-6))
        master = rule(master, g)               weight = round(master)

The rules are those of ``torch.optim``: see ``csrc/rules.h``, which holds them for the kernels, and
``_adam`` and ``_sgd`` below, which hold them in plain PyTorch: the oracle of the tests, and the
fallback for dtypes and devices without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cpu
from fastmp.backends.table import HYPER_FIELDS, RECORD, Rule, record_field
from fastmp.ops.plan import Plan, Slot

NO_CLIP = -1.0


class Hyper(NamedTuple):
    """One group's hyperparameters, as ``fastmp_hyper`` in ``csrc/table.h`` lays them out."""

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


assert Hyper._fields == HYPER_FIELDS


def new_record(device: torch.device) -> Tensor:
    """A zeroed ``fastmp_record``: read it through ``backends.table.record_field``."""
    record = torch.zeros(RECORD.itemsize, dtype=torch.uint8, device=device)
    record_field(record, "offender").fill_(-1)
    return record


# ---- split masters ----


def split_master(value: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as (bf16 weight, int16 remainder); see ``csrc/numerics.h``."""
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    weight = (bits + 0x8000) >> 16
    return weight.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that a bf16 weight and its int16 remainder stand for, to the bit."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder).view(torch.float32)


# ---- running a step ----


def run(
    plan: Plan,
    hypers: Tensor,
    record: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float = NO_CLIP,
    unchecked: bool = False,
) -> None:
    """Take one step with every tensor of the plan.

    Args:
        plan: the tensors; parameters, masters, states and steps are changed in place, or, if any
            gradient is not finite, not at all.
        hypers: float64 (groups, 10), one ``Hyper`` per row, on the CPU.
        record: what was decided; see ``new_record``.
        grad_scale: 0-d fp32, the loss scale that the gradients carry; None: 1.
        found_inf: 0-d fp32, non-zero if somebody else saw an overflow (another rank, a scaler).
        max_grad_norm: clip the global norm of the unscaled gradients to this; negative: do not.
        unchecked: unless there is a norm to clip to, a scale or a found_inf, do not look at the
            gradients first. One pass over them less; one that is not finite goes in, as in torch.
    """
    unchecked = unchecked and max_grad_norm < 0 and grad_scale is None and found_inf is None
    if plan.fallback is not None:
        _reference(
            plan.slots, plan.grads, hypers, record, grad_scale, found_inf, max_grad_norm, unchecked
        )
        return
    scale = None if grad_scale is None else _fp32_on_cpu(grad_scale)
    found = None if found_inf is None else _fp32_on_cpu(found_inf)
    args = cpu.UpdateArgs(
        rows=plan.rows.ctypes.data,
        row_count=len(plan.rows),
        groups=hypers.data_ptr(),
        group_count=len(hypers),
        grad_scale=None if scale is None else scale.data_ptr(),
        found_inf=None if found is None else found.data_ptr(),
        max_grad_norm=max_grad_norm,
        unchecked=unchecked,
        record=record.data_ptr(),
    )
    cpu.call("fastmp_update", args)


def _fp32_on_cpu(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float32)


# ---- the reference ----


def _adam(master: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyper) -> Tensor:
    """torch.optim.Adam and AdamW, one tensor; returns the new value, changes the states."""
    if h.decoupled:
        master = master * (1 - h.lr * h.weight_decay)
    else:
        g = g + h.weight_decay * master
    m, v = states[0], states[1]
    m.lerp_(g, 1 - h.beta1)
    v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
    if h.rule == Rule.AMSGRAD:
        v = torch.maximum(states[2], v, out=states[2])
    denominator = v.sqrt() / (1 - h.beta2**step) ** 0.5 + h.eps
    return torch.addcdiv(master, m, denominator, value=-h.lr / (1 - h.beta1**step))


def _sgd(master: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyper) -> Tensor:
    """torch.optim.SGD, one tensor; returns the new value, changes the states."""
    g = g + h.weight_decay * master
    if h.rule == Rule.MOMENTUM:
        buffer = states[0]
        if step == 1:
            buffer.copy_(g)
        else:
            buffer.mul_(h.beta1).add_(g, alpha=1 - h.dampening)
        g = g + h.beta1 * buffer if h.nesterov else buffer
    return master - h.lr * g


_RULES: dict[Rule, Callable[[Tensor, Tensor, Sequence[Tensor], float, Hyper], Tensor]] = {
    Rule.ADAM: _adam,
    Rule.AMSGRAD: _adam,
    Rule.SGD: _sgd,
    Rule.MOMENTUM: _sgd,
}


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def _reference(
    slots: Sequence[Slot],
    grads: Sequence[Tensor],
    hypers: Tensor,
    record: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    unchecked: bool,
) -> None:
    scale = 1.0 if grad_scale is None else float(grad_scale)
    usable = np.isfinite(scale) and scale != 0.0
    unscale = 1.0 / scale if usable else 1.0
    bad = [not unchecked and not bool(grad.isfinite().all()) for grad in grads]
    # hypot over the tensors' norms: the squares of fp64 gradients may not fit
    norms = [float((_wide(grad).double() * unscale).norm()) for grad in grads]
    norm = float(torch.tensor(norms, dtype=torch.float64).norm()) if norms else 0.0
    record_field(record, "grad_norm").fill_(np.nan if unchecked else norm)
    told = found_inf is not None and float(found_inf) != 0.0
    if any(bad) or told or not usable:
        record_field(record, "found_inf").fill_(1.0)
        record_field(record, "skipped").add_(1)
        if any(bad):
            record_field(record, "offender").fill_(slots[bad.index(True)].number)
        return
    clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm >= 0 else 1.0
    groups = [Hyper(*row) for row in hypers.tolist()]
    for slot, grad in zip(slots, grads, strict=True):
        h = groups[slot.group]
        g = _wide(grad) * (unscale * clip * (-1 if h.maximize else 1))
        slot.step.add_(1)
        master = slot.master
        if master is None:
            old = slot.param
        else:
            old = join_master(slot.param, master) if master.dtype == torch.int16 else master
        new = _RULES[Rule(int(h.rule))](old, g, slot.states, float(slot.step), h)
        if master is None:
            slot.param.copy_(new)
        elif master.dtype == torch.int16:
            weight, remainder = split_master(new)
            slot.param.copy_(weight)
            master.copy_(remainder)
        else:
            master.copy_(new)
            slot.param.copy_(new)
    record_field(record, "found_inf").fill_(0.0)
    record_field(record, "applied").add_(1)


# ---- the operation ----

_library = torch.library.Library("fastmp", "FRAGMENT")
_library.define(
    "update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] states, "
    "Tensor(d!)[] steps, int[] groups, Tensor hypers, Tensor? grad_scale, Tensor? found_inf, "
    "float max_grad_norm, Tensor(e!) record) -> ()"
)


def _update_op(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    groups: list[int],
    hypers: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    record: Tensor,
) -> None:
    """``fastmp::update_``: as ``run``, on lists.

    ``masters`` has one tensor per parameter (empty for fp32 ones), ``states`` the states of the
    first parameter, then of the second, and so on, as many for each.
    """
    count = len(states) // len(params) if params else 0
    slots = [
        Slot(
            param,
            None if param.dtype in (torch.float32, torch.float64) else masters[i],
            tuple(states[i * count : (i + 1) * count]),
            steps[i],
            groups[i],
            i,
        )
        for i, param in enumerate(params)
    ]
    run(Plan(slots, grads), hypers, record, grad_scale, found_inf, max_grad_norm)


_library.impl("update_", _update_op, "CompositeExplicitAutograd")
torch.library.register_fake("fastmp::update_", lambda *args: None, lib=_library)

cpu.serves("update")
