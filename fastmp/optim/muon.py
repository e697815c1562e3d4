"""Muon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastmp.backends.abi import Hyperparameters
from fastmp.backends.registry import on_host
from fastmp.ops.update import Options, TensorRow
from fastmp.ops.update.rules import rule
from fastmp.ops.update.step_table import StepTable
from fastmp.optim import adam, muon_state
from fastmp.optim.averages import Ema
from fastmp.optim.base import FusedOptimizer
from fastmp.optim.muon_batches import Directions, matrix_shape

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_MOMENTUM, _APPLY = 5, 6  # the rules of the two passes
_MUON_KEYS = ("momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
_ADAMW_DEFAULTS = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
}
_CHECKED_BY_ADAMW = ("lr", "betas", "eps", "weight_decay")
_ADJUSTMENTS = (None, "original", "match_rms_adamw")


class _TorchMuon(torch.optim.Muon):
    """torch's class without its constructor, which takes nothing but matrices."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        torch.optim.Optimizer.__init__(self, params, defaults)


class Muon(FusedOptimizer, _TorchMuon):
    """``torch.optim.Muon`` with fp32 masters, one decision a step, and AdamW for the rest.

    The momentum of a matrix is orthogonalised before it is applied (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/). A step is two fused passes, one that makes the
    directions of all matrices and updates the AdamW groups, one that applies, and between them
    ``ops.orthogonalize`` in bf16 (fp64 for fp64 parameters) on all matrices of one shape at once.
    Overflow check, clip and schedule are decided before the first of them writes; a skipped step
    changes nothing in any group. docs/muon.md says when to take it and what to set.

    A weight of more than two dimensions (a convolution's) is the matrix (out, rest). Beside the
    state there are 2 bytes a parameter of the Muon groups for the directions, and 2 to 10 a
    parameter of the largest batch of one shape for the iteration, 10 for square matrices; on a GPU
    with Triton 4, and at most 4 more, to 256 MB.

    A matrix whose direction has a norm beyond 1.8e19, the square of which exceeds fp32, gets no
    update but the decay, as in torch. ``grad_norm`` is infinite in the step that brought it there.

    Args:
        params: tensors, dicts or (name, tensor) pairs: fp32, fp16, bf16 or fp64.
            ``muon_groups(model)`` sorts those of a model. A group with ``"rule": "adamw"`` takes
            AdamW's ``lr betas eps weight_decay amsgrad maximize``, by default torch's. Its ``lr``
            is by default that of the optimizer with ``adjust_lr_fn="match_rms_adamw"``, else 1e-3;
            under a schedule its ratio to the optimizer's (``lr_scale``) stays.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            torch. ``momentum`` must be below 1.
        max_grad_norm: clip the global norm of the unscaled gradients of all groups to this, as
            ``torch.nn.utils.clip_grad_norm_`` does, above 0; None: do not clip.
        skip_nonfinite, ema, state_dtype, master: as in ``Adam``.

    Raises:
        ValueError: as torch, a vector or scalar in a Muon group, an unknown rule, ``ns_steps``
            outside [1, 100), ``ns_coefficients`` that are not three numbers, a weight whose first
            dimension lies in memory between others, a ``max_grad_norm`` that is not above 0, or a
            sparse, complex, integer or distributed parameter.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        ema: Ema | None = None,
        state_dtype: torch.dtype | str | None = None,
        master: str | None = None,
    ) -> None:
        self._directions: Directions | None = None
        self._second: StepTable | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "rule": "muon",
        }
        _check_options(defaults)
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema=ema,
            state_dtype=state_dtype,
            master=master,
        )

    def __setstate__(self, restored: dict[str, Any]) -> None:
        self._directions, self._second = None, None
        super().__setstate__(restored)

    # ---- groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ``"rule"`` is "muon" or "adamw".

        Raises:
            ValueError: as the constructor. No group is added then.
        """
        is_adamw = param_group.get("rule", "muon") == "adamw"
        if not is_adamw and any(hasattr(p, "device_mesh") for p in _tensors(param_group)):
            raise ValueError(
                "Muon needs whole matrices, got a DTensor, of which this rank has a part; train "
                "with DistributedDataParallel, or with another optimizer"
            )
        if is_adamw:
            param_group = self._with_adamw_defaults(param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            if is_adamw:
                for key in set(_MUON_KEYS) - set(_ADAMW_DEFAULTS):
                    del added[key]
            else:
                _check_options(added)
                _check_matrices(added)
        except ValueError:
            self.param_groups.pop()
            raise

    def _with_adamw_defaults(self, group: dict[str, Any]) -> dict[str, Any]:
        own = self.defaults["lr"]
        shared = self.defaults["adjust_lr_fn"] == "match_rms_adamw"
        group = {**_ADAMW_DEFAULTS, "lr": own if shared else 1e-3, **group}
        known = not isinstance(own, Tensor) and not isinstance(group["lr"], Tensor)
        if known and own > 0 and group["lr"] != own:
            group.setdefault("lr_scale", group["lr"] / own)
        torch.optim.AdamW(
            [torch.empty(0, dtype=torch.float32, device="cpu")],
            **{k: group[k] for k in _CHECKED_BY_ADAMW},
        )
        return group

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        if _is_adamw(group):
            return adam.state_keys(group)
        return ("momentum_buffer",)

    def _hyper(self, group: dict[str, Any]) -> Hyperparameters:
        if _is_adamw(group):
            return adam.hyperparameters(group, self._lr(group))
        return Hyperparameters(
            rule=_MOMENTUM,
            lr=self._lr(group),
            beta1=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
        )

    @rule(_MOMENTUM)
    @staticmethod
    def _make_direction(
        p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyperparameters
    ) -> Tensor:
        buffer = states[0].lerp_(g, 1 - h.beta1)
        return g.lerp(buffer, h.beta1) if h.nesterov else buffer

    @rule(_APPLY)
    @staticmethod
    def _apply(
        p: Tensor, g: Tensor, states: Sequence[Tensor], step: float, h: Hyperparameters
    ) -> Tensor:
        return p * (1 - h.lr * h.weight_decay) - h.lr * g

    # ---- the step ----

    def _step(self) -> None:
        if self._directions is not None and self._directions.options != self._options():
            self._tables.table = None
        super()._step()

    def _options(self) -> list[tuple[Any, ...] | None]:
        """What the iteration of each group depends on; None for AdamW's."""
        return [None if _is_adamw(g) else _options_of(g) for g in self.param_groups]

    def _prepare_rows(self, rows: list[TensorRow]) -> list[TensorRow]:
        """Rows of the first pass; makes the table of the second."""
        directions = Directions(rows, self._options())
        applied = [
            row._replace(rule=_APPLY, states=(), scales=None)
            for row in rows
            if row.rule == _MOMENTUM
        ]
        self._directions = directions
        self._second = StepTable(applied, directions.results) if applied else None
        views = iter(directions.sources)
        return [
            row._replace(direction=next(views), average=None) if row.rule == _MOMENTUM else row
            for row in rows
        ]

    def _run(self, table: StepTable, hypers: list[Hyperparameters], options: Options) -> None:
        super()._run(table, hypers, options)
        directions, second = self._directions, self._second
        if not table.params or directions is None or second is None:
            return
        if on_host(self.found_inf) and self.found_inf:
            return  # on a GPU the second pass finds that out: the host does not wait
        directions.orthogonalize()
        second.bind_alike(directions.results)
        applied = [h._replace(rule=_APPLY) if h.rule == _MOMENTUM else h for h in hypers]
        super()._run(second, applied, options._replace(continues=True))

    # ---- states of torch's ----

    def torch_states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """``torch_state_dict`` for ``torch.optim.Muon`` and ``torch.optim.AdamW``, with its groups.

        With ``masters`` a run goes on in plain PyTorch, kernels of convolutions flattened.
        """
        return muon_state.split(self.torch_state_dict())

    def load_torch_states(self, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        """Load what ``state_dict`` of torch's two optimizers gave, as ``load_state_dict`` does.

        Raises:
            ValueError: other numbers of groups or of parameters in a group, or state of another
                shape than its parameter. Nothing has changed then.
        """
        self.load_state_dict(muon_state.join(self.state_dict(), muon, adamw))

    def launch_constants(self) -> tuple[Any, ...]:
        """As of the other optimizers, and the options of the iteration."""
        return (*super().launch_constants(), self._options())


def _tensors(group: dict[str, Any]) -> list[Any]:
    params = group["params"]
    listed = [params] if isinstance(params, Tensor) else list(params)
    group["params"] = listed
    return [p[1] if isinstance(p, tuple) else p for p in listed]


def _is_adamw(group: dict[str, Any]) -> bool:
    return bool(group.get("rule") == "adamw")


def _options_of(group: dict[str, Any]) -> tuple[Any, ...]:
    coefficients = tuple(map(float, group["ns_coefficients"]))
    return coefficients, int(group["ns_steps"]), float(group["eps"]), group["adjust_lr_fn"]


def _check_options(group: dict[str, Any]) -> None:
    """Refuse options that the iteration cannot use; messages as torch's where it has them."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum should be >= 0 and below 1 but is: {momentum}")
    if not decay >= 0.0:
        raise ValueError(f"weight decay should be >= 0 but is: {decay}")
    if group["adjust_lr_fn"] not in _ADJUSTMENTS:
        raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    try:
        valid = len(coefficients) == 3 and all(map(math.isfinite, coefficients))
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"ns_coefficients: expected three numbers, got {coefficients!r}")
    if not (isinstance(steps, int) and 1 <= steps < 100):
        raise ValueError(f"ns_steps: expected a whole number in [1, 100), got {steps!r}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"eps should be >= 0 but is: {group['eps']}")
    if group["rule"] not in ("muon", "adamw"):
        raise ValueError(f'rule: expected "muon" or "adamw", got {group["rule"]!r}')


def _check_matrices(group: dict[str, Any]) -> None:
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        if param.ndim < 2:
            raise ValueError(
                f"Muon takes matrices and kernels of convolutions, got {name} of shape "
                f"{tuple(param.shape)}; give vectors and scalars a group with "
                '"rule": "adamw", or sort a model with fastmp.optim.muon_groups(model)'
            )
        matrix_shape(param)
