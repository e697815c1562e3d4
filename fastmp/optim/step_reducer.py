"""Steps on parameters that are split over ranks: one norm, one clip, one overflow check for all.

A rank sees the gradients of its own part. One all-reduce a step, of the squared norm of every
gradient, makes the rest follow: global norm, clip, and whether any gradient is not finite.

Split parameters are recognized: those of ``torch.distributed.fsdp.FullyShardedDataParallel``, and
the ones that a ``ZeroRedundancyOptimizer`` gave to this rank. ``fastmp.distributed.fsdp`` hands its
reducer in itself.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastmp.ops import update
from fastmp.ops.update import Options
from fastmp.optim.schedule_table import COLUMNS, is_set
from fastmp.optim.step_context import LocalStep, ReducedStep, StepReducer

_CLIP = COLUMNS.index("max_grad_norm")


class GroupReducer:
    """The step of all ranks of a process group. A ``StepReducer``.

    Args:
        group: None: the default group.
        device: of the exchange; None: that of the parameters.
        replicated: param_indices whose gradients are equal on all ranks; they count once.
        same_params: every rank's optimizer has (parts of) the same parameters, in the same order.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        device: torch.device | None = None,
        replicated: Sequence[int] = (),
        same_params: bool = True,
    ) -> None:
        self.device = device
        self._group, self._replicated, self._same_params = group, list(replicated), same_params
        self._schedule: tuple[Tensor, Tensor, bool] | None = None

    @torch.no_grad()
    def __call__(self, step: LocalStep) -> ReducedStep | None:
        """The step of all ranks, which must all call this.

        The clip goes into the scale that the kernels divide by, so it costs no pass.
        """
        options, limit = self._clip_limit(step)
        if not update.needs_scan(options, 0.0 if limit is not None else update.NO_CLIP):
            return None
        squares, found_inf, grad_count = self._exchange(step)
        nonfinite = ~squares.isfinite()  # fp64 holds the square of any fp32 number
        scale = torch.ones_like(found_inf) if options.grad_scale is None else options.grad_scale
        norm = squares.sum().sqrt() / scale
        if limit is not None:
            # a factor of zero, for max_grad_norm=0, would leave no scale to divide by
            scale = scale / update.clip_coefficient(norm, limit).clamp(min=1e-30)
        reduced = options._replace(
            grad_scale=scale.float(),
            external_found_inf=(nonfinite.any() | (found_inf > 0)).float(),
            max_grad_norm=update.NO_CLIP,
        )
        known = nonfinite.any() & self._same_params
        first = torch.where(known, nonfinite.byte().argmax(), -1)
        return ReducedStep(reduced, norm, first, grad_count)

    def _exchange(self, step: LocalStep) -> tuple[Tensor, Tensor, Tensor]:
        """Squared norms by param_index, found_inf, and number of gradients, of all ranks."""
        message = torch.zeros(step.param_count + 2, dtype=torch.float64, device=step.device)
        if step.grads:
            norms = torch.stack(torch._foreach_norm(list(step.grads), 2, torch.float64))
            message[torch.tensor(step.param_indices, dtype=torch.int64, device=step.device)] = (
                norms.square()
            )
        if self._replicated:  # the sum over the ranks makes it whole again
            message[self._replicated] /= dist.get_world_size(self._group)
        if step.options.external_found_inf is not None:
            message[-2] = step.options.external_found_inf != 0
        message[-1] = len(step.grads)
        if not self._same_params:  # an index means another parameter, and their number differs
            message = torch.cat([message[:-2].sum().reshape(1), message[-2:]])
        message = message.to(self.device or step.device)
        dist.all_reduce(message, group=self._group)
        message = message.to(step.device)
        return message[:-2], message[-2], message[-1]

    def _clip_limit(self, step: LocalStep) -> tuple[Options, Any]:
        """The norm to clip to, None for none, and options whose schedule says nothing of it."""
        options = step.options
        own: Any = options.max_grad_norm if options.max_grad_norm >= 0 else None
        if options.schedule is None:
            return options, own
        if self._schedule is None or self._schedule[0] is not options.schedule:
            rest = options.schedule.clone()
            rest[:, _CLIP] = torch.nan
            clips = is_set(options.schedule, "max_grad_norm")  # waits, once a schedule
            self._schedule = (options.schedule, rest, clips)
        table, rest, clips = self._schedule
        if clips:
            row = step.applied.clamp(max=len(table) - 1).reshape(1)
            own = table[:, _CLIP].index_select(0, row)[0]
        return options._replace(schedule=rest), own


# ---- split parameters are found ----


def is_distributed() -> bool:
    """Whether this process has a process group of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ReducerSearch:
    """Finds the reducer of an optimizer's parameters, again when they are other ones."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._found: StepReducer | None = None

    def __call__(self, params: list[Tensor]) -> StepReducer | None:
        """None: each rank's gradients are whole.

        Raises:
            RuntimeError: parameters of FSDP that are not split over one known group.
        """
        known = len(params) == len(self._params) and all(map(is_, params, self._params))
        if not known:
            marks = [getattr(p, "_fsdp_flattened", False) for p in params]
            self._found = _fsdp_reducer(params, marks) if any(marks) else None
            self._params = params
        return self._found


def _fsdp_reducer(params: Sequence[Tensor], marks: Sequence[bool]) -> StepReducer | None:
    handles = _fsdp_handles()
    owners = [handles.get(id(p)) if m else None for p, m in zip(params, marks, strict=True)]
    for i, (owner, mark) in enumerate(zip(owners, marks, strict=True)):
        if mark and (owner is None or owner._fsdp_extension is not None):
            raise RuntimeError(
                f"parameter {i} is a part that FSDP made, but of a model "
                + ("that is gone" if owner is None else "that is split over tensor parallel ranks")
                + ": its norm over all ranks is unknown. Give the optimizer the parameters of the "
                "FSDP module that is trained, or split with fastmp.distributed.fsdp.shard"
            )
    split = [o for o in owners if o is not None and o.uses_sharded_strategy]
    groups = {tuple(dist.get_process_group_ranks(o.process_group)): o for o in split}
    if len(groups) > 1:
        raise RuntimeError(
            "expected all FSDP parameters of an optimizer split over the same ranks, got "
            f"{', '.join(map(str, sorted(groups)))}; use one optimizer for each group of ranks"
        )
    for owner in groups.values():
        whole = [i for i, o in enumerate(owners) if o is None or not o.uses_sharded_strategy]
        return GroupReducer(owner.process_group, device=owner.device, replicated=whole)
    return None  # NO_SHARD: the gradients of all ranks have been averaged


def _fsdp_handles() -> dict[int, Any]:
    """FSDP's handle of a parameter, by its id; FSDP keeps no list of them."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    found = {}
    for handle in gc.get_objects():
        if type(handle) is FlatParamHandle:
            for param in (handle.flat_param, *(handle.flat_param._params or ())):
                found[id(param)] = handle
    return found


def watch_wrappers() -> None:
    """From now on a ``ZeroRedundancyOptimizer`` hands its process group to the optimizer in it."""
    if not _watching and is_distributed():
        _watching.append(register_optimizer_step_pre_hook(_hand_over_group))


_watching: list[Any] = []


def _hand_over_group(wrapper: Any, args: Any, kwargs: Any) -> None:
    context = getattr(getattr(wrapper, "optim", None), "step_context", None)
    group = getattr(wrapper, "process_group", None)
    if context is not None and group is not None and context.reduce_step is None:
        device = next(p.device for g in wrapper.param_groups for p in g["params"])
        context.reduce_step = GroupReducer(group, device=device, same_params=False)


# ---- the scaler ----


def check_scaler(scaler: Any) -> None:
    """Refuse torch's scaler, which checks the gradients of its own rank alone.

    Raises:
        RuntimeError: ``scaler`` is a ``torch.amp.GradScaler`` that asks no other rank.
    """
    sharded = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    asks_all = sharded is not None and isinstance(scaler, sharded.ShardedGradScaler)
    if isinstance(scaler, torch.amp.GradScaler) and not asks_all:
        raise RuntimeError(
            f"{type(scaler).__name__} looks for overflows on its own rank, and each rank has a "
            "part of the gradients: their scales would drift apart. Use fastmp.amp.GradScaler, or "
            "torch's ShardedGradScaler"
        )
