"""What the fused optimizers share: the step, and what the step decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmp.backends.abi import record_field
from fastmp.ops import update
from fastmp.ops.update import Options
from fastmp.ops.update.rules import Hyperparameters
from fastmp.ops.update.step_table import StepTable, TensorRow
from fastmp.optim import state
from fastmp.optim.schedule_table import table, tabulate
from fastmp.schedule import Schedule

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# from gradients, their parameters' positions and a step's options to the options that all ranks
# have agreed on, the norm over all ranks, and the position of what was not finite, or -1
Agree = Callable[[Sequence[Tensor], Sequence[int], Options], tuple[Options, Tensor, Tensor]]


class FusedOptimizer(torch.optim.Optimizer):
    """What the fused optimizers share: state, the step, and what the step decided.

    Subclasses say which state a group keeps (``_state_keys``) and how a group's options become
    hyperparameters (``_hyper``).
    """

    _step_supports_amp_scaling = True  # GradScaler hands us grad_scale and found_inf
    grad_scale: Tensor | None  # there during a step with a scaler, whichever sets it
    max_grad_norm: float | None
    skip_nonfinite: bool
    _told: Tensor | None = None  # during a step: the found_inf that a scaler handed in
    _schedule: Tensor | None = None
    agree: Agree | None = None  # where each rank holds a part of every parameter

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        raise NotImplementedError

    def _lr(self, group: dict[str, Any]) -> float:
        """A group's lr, or its factor if there is a schedule; 0 if a GPU has it in its memory."""
        if self._schedule is not None:
            return float(group.get("lr_scale", 1.0))
        lr = group["lr"]
        return 0.0 if isinstance(lr, Tensor) and lr.is_cuda else float(lr)

    def _init_fused(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm: expected a number >= 0, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._plan: StepTable | None = None
        self._plan_rules: list[float] = []
        self._plan_state: list[Any] = []
        self._halves: list[TensorRow] = []
        self._versions: list[int] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, refusing parameters that no kernel and no reference can update.

        Raises:
            ValueError: a sparse, complex or integer parameter, a DTensor, or
                ``differentiable=True``.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            if added.get("differentiable"):
                raise ValueError("differentiable=True is not supported; use torch.optim for it")
            for i, param in enumerate(added["params"]):
                if param.dtype not in _DTYPES or param.layout != torch.strided:
                    raise ValueError(
                        f"parameter {i} of the group: expected a dense fp32, fp16, bf16 or fp64 "
                        f"tensor, got {param.dtype} with layout {param.layout}"
                    )
                if hasattr(param, "device_mesh"):
                    raise ValueError(
                        f"parameter {i} of the group is a DTensor: split the model with "
                        "fastmp.distributed.fsdp.shard(model, dtype) instead of fully_shard, and "
                        "take its named_parameters(); all ranks then decide clip and overflow"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    # ---- the step ----

    # One kernel: a compiled training loop calls it as it is. torch.compiler.disable, the public
    # name, would import the compiler with fastmp; this one does so at the first call.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, unless one is not finite.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Raises:
            RuntimeError: a sparse gradient.
            ValueError: parameters on several devices, or a gradient that does not fit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if type(None) in set(map(type, grads)):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            return loss
        hypers = [self._hyper(group) for group in self.param_groups]
        rules = [hyper.rule for hyper in hypers]
        plan = self._plan
        current = plan is not None and rules == self._plan_rules and self._is_current(plan, params)
        if plan is None or not current or not plan.bind_gradients(grads):
            plan = self._new_plan(grads, rules)
        self._adopt_changed_weights()
        device = params[0].device
        limit = update.NO_CLIP if self.max_grad_norm is None else self.max_grad_norm
        options = Options(
            limit,
            getattr(self, "grad_scale", None),
            self._told,
            not self.skip_nonfinite,
            self._schedule_on(device),
        )
        lrs = [] if self._schedule is not None else self._lrs_on_gpu()
        record = self._record_for(device)
        if self.agree is not None:
            numbers = [slot.number for slot in plan.slots]
            options, norm, first_nonfinite = self.agree(grads, numbers, options)
            first_nonfinite = torch.where(
                first_nonfinite < 0, self.first_nonfinite, first_nonfinite
            )
        update.run(plan, np.array(hypers, np.float64), record, options, lrs)
        if self.agree is not None:
            self.grad_norm.copy_(norm)
            self.first_nonfinite.copy_(first_nonfinite)
        # the kernel wrote behind autograd's back: a backward through the old weights must raise
        torch.autograd.graph.increment_version(plan.params)
        return loss

    def has_gradients_on(self, device: torch.device) -> bool:
        """Whether a parameter on this device has a gradient."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device == device for p in params if p.grad is not None), False)

    def _flat_state(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.state.values())))

    def _is_current(self, plan: StepTable, params: list[Tensor]) -> bool:
        """Whether the plan still describes parameters, rules and state as they are."""
        held = self._flat_state()
        return (
            len(held) == len(self._plan_state)
            and all(map(is_, held, self._plan_state))
            and plan.matches(params)
        )

    def _lrs_on_gpu(self) -> list[tuple[int, Tensor]]:
        """The groups whose lr is in a GPU's memory: read there when the step runs, not here."""
        lrs = [(i, group["lr"]) for i, group in enumerate(self.param_groups)]
        return [(i, lr) for i, lr in lrs if isinstance(lr, Tensor) and lr.is_cuda]

    def _new_plan(self, grads: list[Tensor], rules: list[float]) -> StepTable:
        slots: list[TensorRow] = []
        index = 0
        for number, group in enumerate(self.param_groups):
            keys = self._state_keys(group)
            in_use = [p for p in group["params"] if p.grad is not None]
            state.allocate(self.state, in_use, keys)
            for param in group["params"]:
                if param.grad is not None:
                    own = self.state[param]
                    state.conform(own, param, keys)
                    master = own.get(state.MASTER_KEYS.get(param.dtype))
                    states = tuple(own[key] for key in keys)
                    rule = int(rules[number])
                    slots.append(TensorRow(param, master, states, own["step"], number, index, rule))
                index += 1
        self._plan = StepTable(slots, grads)
        self._plan_rules = rules
        self._plan_state = self._flat_state()
        self._halves = [slot for slot in slots if slot.param.dtype == torch.float16]
        self._versions = []
        return self._plan

    def _adopt_changed_weights(self) -> None:
        """Take over fp16 weights that were written from outside since the last step.

        Otherwise the next write-back of the master would undo a ``load_state_dict`` or a manual
        edit. A weight that still equals its rounded master keeps the master's finer value. bf16
        needs none of this: there the weight is the upper half of the master.
        """
        versions = [slot.param._version for slot in self._halves]
        if versions != self._versions:
            for slot in self._halves:
                assert slot.master is not None
                kept = slot.master.to(torch.float16) == slot.param
                slot.master.copy_(torch.where(kept, slot.master, slot.param.float()))
        self._versions = [version + 1 for version in versions]  # as the step will leave them

    # ---- the schedule ----

    def bind_schedule(self, schedule: Schedule, steps: int | None = None) -> None:
        """Follow ``schedule`` on the device, by applied steps; see ``set_schedule``.

        Args:
            schedule: (lr, momentum) of the number of applied steps.
            steps: length of the table, from applied step 0 on; later steps have its last values.
                None: the schedule's own, which ``Cyclic`` and plain functions have not.

        Raises:
            ValueError: no ``steps`` for a schedule without a length, or below 1; or a momentum that
                is None at some steps only, or that a group has no use for.
        """
        lr, momentum = tabulate(schedule, steps)
        self.set_schedule(lr, momentum)

    def set_schedule(
        self,
        lr: Sequence[float],
        momentum: Sequence[float] | None = None,
        max_grad_norm: Sequence[float] | None = None,
    ) -> None:
        """Take hyperparameters from a table, by the number of applied steps.

        The step after k applied ones takes entry k; past the end, the last one. The table lies
        where the parameters do, so a skipped step does not shift it and a CUDA graph follows it
        when it is replayed. While there is a table, ``lr`` of the groups is not read: every group
        has the table's, times its ``lr_scale`` if it has one. Capture graphs after this call.

        Args:
            lr: one for each step.
            momentum: likewise, for SGD's momentum or the first of the betas; None: the groups' own.
            max_grad_norm: likewise, the norm to clip to; None: the optimizer's own.

        Raises:
            ValueError: an empty table, columns of several lengths, a negative number or one that is
                not finite, or a momentum that a group has no use for.
        """
        columns = {"lr": lr, "momentum": momentum, "max_grad_norm": max_grad_norm}
        self._schedule = table(columns, self.param_groups)

    def clear_schedule(self) -> None:
        """Go back to the hyperparameters of the groups."""
        self._schedule = None

    def _schedule_on(self, device: torch.device) -> Tensor | None:
        if self._schedule is not None and self._schedule.device != device:
            self._schedule = self._schedule.to(device)
        return self._schedule

    # ---- saving and loading ----

    def _record_for(self, device: torch.device) -> Tensor:
        record: Tensor | None = self.__dict__.get("_record")
        if record is None or record.device != device:
            self._record = record = update.new_record(device)
        return record

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_grad_norm", "skip_nonfinite", "_record", "_schedule")
        own = {name: self.__dict__[name] for name in names if name in self.__dict__}
        return {**super().__getstate__(), **own}

    def __setstate__(self, restored: dict[str, Any]) -> None:
        super().__setstate__(restored)
        self._forget_plan()
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:
                    state.own(param, self.state[param], self._state_keys(group))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and ``counts``: the applied and the skipped steps, which schedules go by."""
        counts = {"applied": self.applied_steps.clone(), "skipped": self.skipped_steps.clone()}
        return {**super().state_dict(), "counts": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or torch's for the same algorithm, without rounding it.

        torch's has no ``counts``: they stay as they are.

        Raises:
            ValueError: another number of groups or of parameters in a group, as in torch, or state
                of another shape than its parameter. Nothing has changed then.
        """

        # The last pre-hook, so that it sees what the caller's own hooks made of the state.
        handle = self.register_load_state_dict_pre_hook(
            lambda _, loaded: state.protect(
                loaded, [p for group in self.param_groups for p in group["params"]]
            )
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for name, count in state_dict.get("counts", {}).items():
            self._read(name).copy_(count)

    def masters(self) -> list[Tensor]:
        """What the parameters stand for: fp32 copies (fp64 of fp64), in the order of the groups.

        With them and ``state_dict`` a run goes on in plain PyTorch: copy them into the fp32 model,
        and load the state into torch's optimizer of the same name.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        return [state.master_of(p, self.state.get(p, {})).clone() for p in params]

    @torch.no_grad()
    def load_masters(self, values: Sequence[Tensor]) -> None:
        """Set the parameters to these values: 16-bit weights round them, their state has the rest.

        Args:
            values: fp32 (fp64 for fp64), one for each parameter in the order of the groups, of its
                shape, as from ``masters`` or from the parameters of an fp32 model.

        Raises:
            ValueError: another number of values, or one of another shape. Nothing has changed then.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if [v.shape for v in values] != [p.shape for p in params]:
            raise ValueError(
                f"expected {len(params)} values of the parameters' shapes, got {len(values)}: "
                f"{[tuple(v.shape) for v in values]}"
            )
        for group in self.param_groups:
            state.allocate(self.state, group["params"], self._state_keys(group))
        for p, value in zip(params, values, strict=True):
            state.set_master(p, self.state[p], value)

    # ---- what the last step decided ----

    def _read(self, name: str) -> Tensor:
        params = (p for group in self.param_groups for p in group["params"])
        record = self.__dict__.get("_record")
        if record is None:
            record = self._record_for(next(params).device)
        return record_field(record, name)

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's unscaled gradients before clipping, 0-d fp32.

        NaN after a step with ``skip_nonfinite=False`` that had no other reason to look.
        """
        return self._read("grad_norm")

    @property
    def found_inf(self) -> Tensor:
        """1 if the last step was skipped, else 0; 0-d fp32.

        torch's GradScaler assigns to this name before a step, to tell what it has found, and
        deletes it afterwards; the value read is always the step's own verdict.
        """
        return self._read("found_inf")

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        self._told = value

    @found_inf.deleter
    def found_inf(self) -> None:
        self._told = None

    @property
    def applied_steps(self) -> Tensor:
        """How many steps changed the parameters, 0-d int64."""
        return self._read("applied")

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped for a non-finite gradient, 0-d int64."""
        return self._read("skipped")

    @property
    def first_nonfinite(self) -> Tensor:
        """The position of the parameter ``nonfinite_param`` names, -1 for none; 0-d int64."""
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
