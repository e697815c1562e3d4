"""update: one optimizer step over many tensors, in one call.

    found_inf = any gradient not finite        norm = || grad / scale ||
    unless found_inf:
        g      = grad / scale * min(1, max_norm / (norm + 1e-6))
        master = rule(master, g)               weight = round(master)

A weight changed from outside since the last step replaces its master: a master is finer than the
weight only while it rounds to it (``current_master``, ``join_master``).

Rules and decisions stand twice: in C++ for the kernels (``csrc/common/rules.h``, ``step.h``), and
in plain PyTorch (``fastmp.optim``, and below) as the oracle of the tests and the fallback for
dtypes and devices without a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import registry
from fastmp.backends.abi import LR, RECORD, Hyperparameters, record_field
from fastmp.backends.native_table import NO_CLIP, Lrs, Options, TensorRow
from fastmp.ops.update import split_fp16, state_kinds
from fastmp.ops.update.rules import QUANTITIES, RULES
from fastmp.ops.update.state_kinds import Quantity
from fastmp.ops.update.step_table import StepTable

__all__ = [
    "NO_CLIP", "Options", "TensorRow", "clip_coefficient", "current_master", "join_master",
    "new_record", "run", "split_master",
]  # fmt: skip


def new_record(device: torch.device) -> Tensor:
    """A zeroed ``fastmp_record``: read it through ``backends.abi.record_field``."""
    record = torch.zeros(RECORD.itemsize, dtype=torch.uint8, device=device)
    record_field(record, "first_nonfinite").fill_(-1)
    return record


def run(
    table: StepTable,
    hypers: np.ndarray,
    record: Tensor,
    options: Options | None = None,
    lrs: Lrs = (),
) -> None:
    """Take one step with every tensor of the table.

    Args:
        table: the tensors; parameters, masters, states and steps are changed in place, or, if any
            gradient is not finite, not at all.
        hypers: float64 (groups, 10), one ``Hyperparameters`` per row.
        record: receives the decisions of the step; see ``new_record``.
        options: None: the defaults.
        lrs: groups whose lr is a tensor in device memory, with it; ``hypers`` has no lr for them.
    """
    options = options or Options()
    if table.kernel is not None:
        table.kernel.step(hypers, record, options, lrs)
        return
    for group, lr in lrs:
        hypers[group, LR] = float(lr)
    try:
        _reference(table, hypers, record, options)
    finally:
        table.grads = []


# ---- masters ----


def split_master(value: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as (16-bit weight, int16 remainder); see ``csrc/common/numerics.h``."""
    if dtype == torch.float16:
        return split_fp16.split(value)
    bits = torch.where(value.isnan(), torch.nan, value).view(torch.int32)
    weight = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, torch.where(_has_remainder(weight), bits.to(torch.int16), 0)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor that a 16-bit weight and its int16 remainder stand for.

    To the bit for bf16, and for fp16 above 2^-17. It rounds to the weight, whatever the remainder:
    one beside a bf16 of 0, inf or NaN counts as 0.
    """
    if weight.dtype == torch.float16:
        return split_fp16.join(weight, remainder)
    high = weight.view(torch.int16).to(torch.int32) << 16
    return torch.where(_has_remainder(weight), high + remainder, high).view(torch.float32)


def _has_remainder(weight: Tensor) -> Tensor:
    magnitude = weight.view(torch.int16) & 0x7FFF
    return (magnitude != 0) & (magnitude < 0x7F80)


def current_master(weight: Tensor, master: Tensor) -> Tensor:
    """The master of a 16-bit weight beside an fp32 tensor: the weight itself where that does not
    round to it, because the weight was changed from outside."""
    return torch.where(master.to(weight.dtype) == weight, master, weight.float())


# ---- decisions, as in csrc/common/step.h ----


class StepDecision(NamedTuple):
    """Decisions before the update."""

    skip: bool
    norm: float  # of the unscaled gradients; NaN: not computed
    grad_factor: float  # unscales and clips
    first_nonfinite: int  # param_index of the first gradient that is not finite; -1: none


def needs_scan(options: Options, max_norm: float) -> bool:
    """Whether the gradients are scanned before the update: a clip needs their norm, say."""
    others = (options.grad_scale, options.external_found_inf)
    return not options.skip_nonfinite_check or max_norm >= 0 or any(t is not None for t in others)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of gradients with this norm, as in ``torch.nn.utils.clip_grad_norm_``."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _decide(
    table: StepTable, options: Options, max_norm: float, device: torch.device
) -> StepDecision:
    scale = 1.0 if options.grad_scale is None else float(options.grad_scale)
    usable = math.isfinite(scale) and scale != 0.0
    unscale = 1.0 / scale if usable else 1.0
    if not needs_scan(options, max_norm):
        return StepDecision(False, math.nan, unscale, -1)
    # hypot over the tensors' norms: the squares of fp64 gradients may not fit
    norms = [float((_wide(grad).double() * unscale).norm()) for grad in table.grads]
    norm = torch.tensor(norms, dtype=torch.float64, device=device).norm()
    clip = float(clip_coefficient(norm, max_norm)) if max_norm >= 0 else 1.0
    nonfinite = (
        row.param_index
        for row, grad in zip(table.rows, table.grads, strict=True)
        if not bool(grad.isfinite().all())
    )
    first = next(nonfinite, -1)
    found_inf = options.external_found_inf is not None and float(options.external_found_inf) != 0.0
    return StepDecision(first >= 0 or found_inf or not usable, float(norm), unscale * clip, first)


def _apply_schedule(
    h: Hyperparameters, options: Options, applied: int
) -> tuple[Hyperparameters, float]:
    """The hyperparameters of the step after ``applied`` ones, and the norm to clip to."""
    if options.schedule is None:
        return h, options.max_grad_norm
    row = options.schedule[min(applied, len(options.schedule) - 1)]
    lr, momentum, max_norm = row.tolist()
    h = h if math.isnan(lr) else h._replace(lr=h.lr * lr)
    h = h if math.isnan(momentum) else h._replace(beta1=momentum)
    return h, options.max_grad_norm if math.isnan(max_norm) else max_norm


def _ema_rate(options: Options, applied: int, step: float) -> float:
    """How far an average goes towards its weight; the first step of a tensor copies it."""
    decays = options.ema_decays
    if decays is None or step <= 1:
        return 1.0
    return 1.0 - float(decays[min(applied, len(decays) - 1)])


def _commit(record: Tensor, decision: StepDecision) -> None:
    record_field(record, "grad_norm").fill_(decision.norm)
    record_field(record, "found_inf").fill_(float(decision.skip))
    record_field(record, "skipped" if decision.skip else "applied").add_(1)
    if decision.first_nonfinite >= 0:
        record_field(record, "first_nonfinite").fill_(decision.first_nonfinite)


# ---- the reference ----


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def _reference(table: StepTable, hypers: np.ndarray, record: Tensor, options: Options) -> None:
    follows = options.schedule is not None or options.ema_decays is not None
    applied = int(record_field(record, "applied")) - options.continues if follows else 0
    groups = [_apply_schedule(Hyperparameters(*h), options, applied) for h in hypers.tolist()]
    if options.continues:
        decision = StepDecision(bool(record_field(record, "found_inf")), math.nan, 1.0, -1)
    else:
        max_norm = groups[0][1] if groups else options.max_grad_norm
        decision = _decide(table, options, max_norm, record.device)
    if not decision.skip:
        for row, grad in zip(table.rows, table.grads, strict=True):
            if not options.continues:
                row.step.add_(1)
            factor, hyper = decision.grad_factor, groups[row.group][0]
            new = _update(row, grad, factor, hyper, options.rounding_seed)
            if row.average is not None:
                row.average.lerp_(new, _ema_rate(options, applied, float(row.step)))
    if not options.continues:
        _commit(record, decision)


def _update(
    row: TensorRow, grad: Tensor, grad_factor: float, h: Hyperparameters, seed: int
) -> Tensor:
    g = _wide(grad) * (grad_factor * (-1 if h.maximize else 1))
    master = row.master
    if master is None or row.direction is not None:
        old = row.param
    else:
        join = join_master if master.dtype == torch.int16 else current_master
        old = join(row.param, master)
    with _widened(row, int(h.rule), seed) as states:
        new = RULES[int(h.rule)](old, g, states, float(row.step), h)
    if row.direction is not None:
        row.direction.copy_(new)
    elif master is None:
        row.param.copy_(new)
    elif master.dtype == torch.int16:
        weight, remainder = split_master(new, row.param.dtype)
        row.param.copy_(weight)
        master.copy_(remainder)
    else:
        master.copy_(new)
        row.param.copy_(new)
    return new


@contextmanager
def _widened(row: TensorRow, rule: int, seed: int) -> Iterator[Sequence[Tensor]]:
    """The states in fp32 for a rule to change, which are then rounded to their kind."""
    narrow = row.states and row.states[0].dtype in (torch.bfloat16, torch.uint8)
    if not narrow:
        yield row.states
        return
    known = QUANTITIES[rule]
    kinds = [*known, *[Quantity.SIGNED] * (len(row.states) - len(known))]
    scales = [None] * len(kinds) if row.scales is None else list(row.scales)
    kept = list(zip(row.states, kinds, scales, strict=True))
    wide = [state_kinds.load(*state) for state in kept]
    yield wide
    words = state_kinds.random_words(seed, row.step, row.param_index, row.param.numel())
    for i, (values, state) in enumerate(zip(wide, kept, strict=True)):
        state_kinds.store(values, *state, state_kinds.bits_for_state(words, i, row.states[i].dtype))


registry.define("update")
