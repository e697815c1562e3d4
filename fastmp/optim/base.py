"""The base of the fused optimizers: the step in five parts, the schedule, saving and loading."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends.abi import Hyperparameters
from fastmp.backends.registry import on_host
from fastmp.ops import update
from fastmp.ops.update import Options
from fastmp.ops.update.step_table import StepTable
from fastmp.optim import state
from fastmp.optim.options import norm_limit, plain
from fastmp.optim.scheduled import ScheduledOptimizer
from fastmp.optim.step_context import LocalStep, ReducedStep, StepContext, StepReducer
from fastmp.optim.step_reducer import ReducerSearch, check_scaler, is_distributed, watch_wrappers
from fastmp.optim.table_cache import TableCache

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LoadedState(NamedTuple):
    """The last state that was loaded: its number, and the applied steps it came with."""

    number: int = 0
    applied: int = 0


class FusedOptimizer(ScheduledOptimizer):
    """Step and state of the fused optimizers; the constructor passes torch's arguments on.

    Subclasses define the state that a group keeps (``_state_keys``) and the hyperparameters that a
    group's options stand for (``_hyper``).
    """

    _loaded = LoadedState()
    _launch_schedule: tuple[Tensor | None, bool] = (None, False)  # and whether it has a momentum

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        **kwargs: Any,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.step_context = StepContext()
        self._tables = TableCache()
        self._search_reducer = ReducerSearch()
        watch_wrappers()
        super().__init__(*args[:1], *map(plain, args[1:]), **plain(kwargs))
        self._state_is_shared = False

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to, above 0; None: they are not clipped."""
        limit: float | None = self.__dict__["max_grad_norm"]
        return limit

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.__dict__["max_grad_norm"] = norm_limit(value)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, refusing parameters that no kernel and no reference can update.

        Raises:
            ValueError: a sparse, complex or integer parameter, a DTensor, or
                ``differentiable=True``.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added.update(plain(added))
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

    # One kernel: there is nothing to compile. torch.compiler.disable, the public name, would import
    # the compiler with fastmp; this one does so at the first call.
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
        params, grads = self._collect(self._params())
        reducer = self._reducer()
        if not params and reducer is None:
            return loss
        self._warn_of_group_rates()
        hypers = [self._hyper(group) for group in self.param_groups]
        if params:
            table = self._tables.bind(self, params, grads, [h.rule for h in hypers])
        else:
            table = StepTable((), ())
        options, reduced = self._decide_options(table, grads, reducer)
        if not params and (reduced is None or not float(reduced.grad_count)):
            return loss  # no rank has a gradient
        self._run(table, hypers, options)
        self._record_step(table, reduced)
        return loss

    def _collect(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients."""
        grads: list[Any] = [p.grad for p in params]
        if type(None) in set(map(type, grads)):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        return params, grads

    def _decide_options(
        self, table: StepTable, grads: list[Tensor], reducer: StepReducer | None
    ) -> tuple[Options, ReducedStep | None]:
        """The options of the step, after an exchange with other ranks if there is a reducer."""
        context = self.step_context
        device = grads[0].device if grads else self._device()
        options = Options(
            update.NO_CLIP if self.max_grad_norm is None else self.max_grad_norm,
            context.grad_scale,
            context.found_inf,
            not self.skip_nonfinite,
            self._schedule_on(device),
        )
        if reducer is None:
            return options, None
        indices = [row.param_index for row in table.rows]
        count = len(self._params())
        local = LocalStep(grads, indices, count, options, self.applied_steps, device)
        reduced = reducer(local)
        return (options if reduced is None else reduced.options), reduced

    def _reducer(self) -> StepReducer | None:
        """Makes the step of all ranks out of this one's, where each has a part; else None."""
        if self.step_context.reduce_step is not None or not is_distributed():
            return self.step_context.reduce_step
        return self._search_reducer(self._params())

    def _run(self, table: StepTable, hypers: list[Hyperparameters], options: Options) -> None:
        lrs = []
        if self._schedule is None:  # an lr in device memory is read when the step runs, not here
            lrs = [(i, group["lr"]) for i, group in enumerate(self.param_groups)]
            lrs = [(i, lr) for i, lr in lrs if isinstance(lr, Tensor) and not on_host(lr)]
        record = self._record_on(table.params[0].device if table.params else self._device())
        update.run(table, np.array(hypers, np.float64), record, options, lrs)

    def _record_step(self, table: StepTable, reduced: ReducedStep | None) -> None:
        if reduced is not None:  # the kernel has seen the gradients of this rank only
            self.grad_norm.copy_(reduced.grad_norm)
            first = reduced.first_nonfinite
            self.first_nonfinite.copy_(torch.where(first < 0, self.first_nonfinite, first))
        # autograd has not seen the kernel's writes: a backward through the old weights must raise
        torch.autograd.graph.increment_version(table.params)
        self._tables.remainders.record()

    def has_gradients_on(self, device: torch.device) -> bool:
        """Whether a parameter on this device has a gradient, on any rank that has a part of it."""
        if self._reducer() is not None:
            return device == self._device()
        return next((p.device == device for p in self._params() if p.grad is not None), False)

    # ---- inputs of a step that a scaler sets: torch's protocol ----

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True: torch's GradScaler checks this rank's gradients, and assigns the two names below.

        False where each rank has a part: a ``ShardedGradScaler`` then asks the others.
        """
        if self._reducer() is None:
            return True
        check_scaler(sys._getframe(1).f_locals.get("self"))
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors assign True with ``fused=True``; it is no choice here."""

    @property
    def grad_scale(self) -> Tensor:
        """The loss scale that the gradients carry; absent unless a scaler, or the user, set it."""
        scale = self.step_context.grad_scale
        if scale is None:
            raise AttributeError("grad_scale is set during a step with a scaler only")
        return scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor | None) -> None:
        self.step_context.grad_scale = value

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self.step_context.grad_scale = None

    @property
    def found_inf(self) -> Tensor:
        """1 if the last step was skipped, else 0; 0-d fp32.

        torch's GradScaler assigns its own finding to this name before a step and deletes it
        afterwards; the value read is the decision of the last step all the same.
        """
        return self._read("found_inf")

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        self.step_context.found_inf = value

    @found_inf.deleter
    def found_inf(self) -> None:
        self.step_context.found_inf = None

    # ---- recorded steps ----

    def launch_constants(self) -> tuple[Any, ...]:
        """The values, not tensors, that a step recorded now would keep; comparable.

        What a schedule on the device replaces is left out.
        """
        hypers = [self._hyper(group) for group in self.param_groups]
        schedule = self._schedule
        if schedule is not None and self._launch_schedule[0] is not schedule:
            moves_momentum = not bool(schedule[0, 1].isnan())  # waits, once a schedule
            self._launch_schedule = (schedule, moves_momentum)
        if schedule is not None and self._launch_schedule[1]:
            hypers = [h._replace(beta1=0.0) for h in hypers]
        lrs = [group["lr"] for group in self.param_groups]
        addresses = [lr.data_ptr() for lr in lrs if isinstance(lr, Tensor)]
        table = None if schedule is None else (schedule.data_ptr(), len(schedule))
        return hypers, addresses, table, self.max_grad_norm, self.skip_nonfinite

    # ---- saving and loading ----

    def __getstate__(self) -> dict[str, Any]:
        names = ("max_grad_norm", "skip_nonfinite", "_record", "_schedule", "_loaded")
        own = {name: self.__dict__[name] for name in names if name in self.__dict__}
        remainders = self._tables.remainders
        exported = {p: remainders.saved_state(p, s) for p, s in self.state.items()}
        own["state"] = defaultdict(dict, exported)
        own["remainders"] = remainders.state_dict(self._params())
        return {**super().__getstate__(), **own}

    def __setstate__(self, restored: dict[str, Any]) -> None:
        restored = dict(restored)
        remainders = restored.pop("remainders", None)
        super().__setstate__(restored)  # by load_state_dict too, which leaves the context alone
        self.__dict__.setdefault("step_context", StepContext())
        self.__dict__.setdefault("_search_reducer", ReducerSearch())
        self._tables = TableCache()
        if remainders is not None:
            self._tables.remainders.load_state_dict(self._params(), remainders)
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:
                    state.to_own_state(param, self.state[param], self._state_keys(group))
        self._state_is_shared = False
        self.accept_group_rates()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and ``counts``: applied and skipped steps, the clock of schedules.

        With bf16 parameters also ``remainders``: checksums of the weights that they complete.
        """
        state.adopt_masters(self.state, self._params(), self._tables.remainders)
        counts = {"applied": self.applied_steps.clone(), "skipped": self.skipped_steps.clone()}
        saved = {**super().state_dict(), "counts": counts}
        # a scheduler may have written numbers of NumPy's
        saved["param_groups"] = [plain(group) for group in saved["param_groups"]]
        params, remainders = self._params(), self._tables.remainders
        for i, param in enumerate(params):
            if saved["state"].get(i) is self.state.get(param, {}):  # no hook has replaced it
                saved["state"][i] = remainders.saved_state(param, self.state[param])
        if any(p.dtype == torch.bfloat16 for p in params):
            saved["remainders"] = remainders.state_dict(params)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or torch's for the same algorithm, without rounding it.

        Without ``counts``, as in torch's states and those of ``torch.distributed.checkpoint``, the
        number of applied steps is the largest ``step`` of a parameter. torch's SGD keeps none:
        then it stays as it is.

        Raises:
            ValueError: another number of groups or of parameters in a group, as in torch, or state
                of another shape than its parameter. Nothing has changed then.
        """

        counts: dict[str, Any] = {}

        # The last pre-hook: after the caller's own, which may change the state.
        def shield(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            counts.update(loaded.get("counts") or state.counts_of(loaded["state"]))
            return state.shield_from_cast(loaded, self._params())

        handle = self.register_load_state_dict_pre_hook(shield)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for name, count in counts.items():
            self._read(name).copy_(torch.as_tensor(count))
        self._loaded = LoadedState(self._loaded.number + 1, int(self.applied_steps))
        if "remainders" in state_dict:
            remainders = self._tables.remainders
            remainders.load_state_dict(self._params(), state_dict["remainders"])

    def masters(self) -> list[Tensor]:
        """The fp32 values of the parameters (fp64 of fp64), copies in the order of the groups.

        With them and ``state_dict`` a run goes on in plain PyTorch: copy them into the fp32 model,
        and load the state into torch's optimizer of the same name.
        """
        own, params = self._own_state, self._params()
        state.adopt_masters(own, params, self._tables.remainders)
        valid = self._tables.remainders.valid_state
        return [state.master_of(p, valid(p, own.get(p, {}))).clone() for p in params]

    @torch.no_grad()
    def load_masters(self, values: Sequence[Tensor]) -> None:
        """Set the parameters to these values: 16-bit weights round them, their state has the rest.

        Args:
            values: fp32 (fp64 for fp64), one for each parameter in the order of the groups, of its
                shape, as from ``masters`` or from the parameters of an fp32 model.

        Raises:
            ValueError: another number of values, or one of another shape. Nothing has changed then.
        """
        params = self._params()
        if [v.shape for v in values] != [p.shape for p in params]:
            raise ValueError(
                f"expected {len(params)} values of the parameters' shapes, got {len(values)}: "
                f"{[tuple(v.shape) for v in values]}"
            )
        own = self._own_state
        state.adopt_masters(own, params, self._tables.remainders)
        for group in self.param_groups:
            state.allocate(own, group["params"], self._state_keys(group))
        for p, value in zip(params, values, strict=True):
            state.set_master(p, own[p], value)
        self._tables.remainders.adopt(params)
