"""The base of the fused optimizers: the step in five parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer

from fastmp.backends.abi import Hyperparameters
from fastmp.backends.registry import on_host
from fastmp.ops import update
from fastmp.ops.update import Options, TensorRow
from fastmp.ops.update.step_table import StepTable
from fastmp.optim import state_kinds
from fastmp.optim.averages import AveragedOptimizer, Ema, decay_table
from fastmp.optim.options import drop_repeats, norm_limit, plain
from fastmp.optim.step_context import LocalStep, ReducedStep, StepContext, StepReducer
from fastmp.optim.step_reducer import ReducerSearch, check_scaler, is_distributed, watch_wrappers
from fastmp.optim.table_cache import TableCache

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FusedOptimizer(AveragedOptimizer):
    """Step and state of the fused optimizers; the constructor passes torch's arguments on.

    Subclasses define the state that a group keeps (``_state_keys``) and the hyperparameters that a
    group's options stand for (``_hyper``).
    """

    #: Whether a step needs all of a parameter, not the rows that one rank has of it.
    needs_whole_parameters = False

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.step_context = StepContext()
        self._tables = TableCache(master == "split")
        self._search_reducer = ReducerSearch()
        self._kind = state_kinds.parse(state_dtype)
        if master not in (None, "split"):
            raise ValueError(f"master: expected None or 'split', got {master!r}")
        self._split = master == "split"
        self._ema = None if ema is None else decay_table(plain(ema))
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

    def __repr__(self) -> str:
        """As torch's, with the norm that all groups together are clipped to."""
        return f"{super().__repr__()[:-1]}max_grad_norm: {self.max_grad_norm}\n)"

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, refusing parameters that no kernel and no reference can update.

        A parameter that is in the group twice counts once.

        Raises:
            ValueError: a sparse, complex or integer parameter, a DTensor, or
                ``differentiable=True``.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added.update(plain(added))
        drop_repeats(added)
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

    def _prepare_rows(self, rows: list[TensorRow]) -> list[TensorRow]:
        """The rows of a new table, as an optimizer of two passes wants them."""
        return rows

    # ---- the step ----

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which wraps ``step`` in a range for profilers and in hooks.

        Without either the step is called as it is: the range alone takes 9 µs of the 64 that a
        step of 161 tensors takes.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                torch._C._autograd._profiler_enabled()
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or optimizer._global_optimizer_pre_hooks
                or optimizer._global_optimizer_post_hooks
            ):
                return hooked(self, *args, **kwargs)
            result = func(self, *args, **kwargs)
            self._optimizer_step_code()  # Python's profilers look for this call
            return result

        return step

    # One kernel: there is nothing to compile. torch.compiler.disable, the public name, would import
    # the compiler with fastmp; this one does so at the first call.
    @torch._disable_dynamo  # type: ignore[attr-defined]
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
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as torch.no_grad, in 0.2 µs instead of 2.5
        try:
            self._step()
        finally:
            torch._C._set_grad_enabled(grad_mode)
        return loss

    def _step(self) -> None:
        self._require_own_weights()
        reducer = self._reducer()
        hypers = [self._hyper(group) for group in self.param_groups]
        rules = [h.rule for h in hypers]
        table = self._tables.rebind(self, rules)
        if table is None:
            params, grads = self._collect(self._params())
            if not params and reducer is None:
                return
            table = self._tables.bind(self, params, grads, rules) if params else StepTable((), ())
        self._warn_of_group_rates()
        options, reduced = self._decide_options(table, reducer)
        if not table.params and (reduced is None or not float(reduced.grad_count)):
            return  # no rank has a gradient
        self._run(table, hypers, options)
        self._record_step(table, reduced)

    def _collect(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients."""
        grads: list[Any] = [p.grad for p in params]
        if type(None) in set(map(type, grads)):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        return params, grads

    def _decide_options(
        self, table: StepTable, reducer: StepReducer | None
    ) -> tuple[Options, ReducedStep | None]:
        """The options of the step, after an exchange with other ranks if there is a reducer."""
        context = self.step_context
        device = table.params[0].device if table.params else self._device()
        options = Options(
            update.NO_CLIP if self.max_grad_norm is None else self.max_grad_norm,
            context.grad_scale,
            context.found_inf,
            not self.skip_nonfinite,
            self._schedule_on(device),
            self._ema_on(device),
            self.rounding_seed,
        )
        if reducer is None:
            return options, None
        _, grads = self._collect(table.params)
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
        table.raise_versions()
        # the reference writes as autograd sees it, and only in a step that is not skipped
        self._tables.remainders.record(raised_by_one=table.kernel is not None)

    def has_gradients_on(self, device: torch.device) -> bool:
        """Whether a parameter on this device has a gradient, on any rank that has a part of it."""
        if self._reducer() is not None:
            return device == self._device()
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return next((p.device == device for p in params if p.grad is not None), False)

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
        if schedule is not None and self._group_momenta:
            hypers = [h._replace(beta1=0.0) for h in hypers]
        lrs = [group["lr"] for group in self.param_groups]
        addresses = [lr.data_ptr() for lr in lrs if isinstance(lr, Tensor)]
        table = None if schedule is None else (schedule.data_ptr(), len(schedule))
        ema = None if self._ema is None else (self._ema.data_ptr(), len(self._ema))
        return hypers, addresses, table, self.max_grad_norm, self.skip_nonfinite, ema
