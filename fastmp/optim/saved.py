"""Saving and loading of an optimizer: state, masters, counts; by copies and by pickles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmp.optim import state, state_kinds
from fastmp.optim.options import plain
from fastmp.optim.scheduled import ScheduledOptimizer
from fastmp.optim.step_context import StepContext
from fastmp.optim.step_reducer import ReducerSearch
from fastmp.optim.table_cache import TableCache


class LoadedState(NamedTuple):
    """The last state that was loaded: its number, and the applied steps it came with."""

    number: int = 0
    applied: int = 0


class SavedOptimizer(ScheduledOptimizer):
    """An optimizer whose state goes to torch's and comes from it, not rounded."""

    step_context: StepContext
    _tables: TableCache
    _loaded = LoadedState()
    _kind = torch.float32  # dtype of the moments
    _split = False  # fp16 weights have remainders, not fp32 masters
    _ema: Tensor | None = None  # decays of the averages by applied steps; None: none are kept
    _averages_are_in = False  # the parameters are their averages: a block of averaged()
    #: Of the random bits that round moments in bf16 and 8 bits; in their ``state_dict``.
    rounding_seed = 0

    @property
    def state_dtype(self) -> torch.dtype | str:
        """How moments are kept: ``torch.float32``, ``torch.bfloat16`` or ``"8bit"``.

        May be set between two steps, and converts them: rounded once, to nearest; exactly where
        fp32 is the new kind, or was only between. Capture graphs after that.
        """
        return "8bit" if self._kind == torch.uint8 else self._kind

    @state_dtype.setter
    def state_dtype(self, value: Any) -> None:
        self._kind = state_kinds.parse(value)
        for group in self.param_groups:
            for param in group["params"]:
                own = self._own_state.get(param)
                if own:
                    state_kinds.convert(own, param, self._state_keys(group), self._kind)
        self._tables.table = None

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _require_own_weights(self) -> None:
        if self._averages_are_in:
            raise RuntimeError(
                "the parameters are their averages in this block of averaged(): step, save and "
                "load outside of it"
            )

    def __getstate__(self) -> dict[str, Any]:
        names = (
            "max_grad_norm",
            "skip_nonfinite",
            "_record",
            "_schedule",
            "_loaded",
            "_kind",
            "_split",
            "_ema",
            "rounding_seed",
        )
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
        self._tables = TableCache(self._split)
        if remainders is not None:
            self._tables.remainders.load_state_dict(self._params(), remainders)
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:
                    keys = self._state_keys(group)
                    state.to_own_state(param, self.state[param], keys, self._kind)
                    if self._ema is None:
                        self.state[param].pop("average", None)
        self._state_is_shared = False
        self.accept_group_rates()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and ``counts``: applied and skipped steps, the clock of schedules.

        With bf16 parameters also ``remainders``: checksums of the weights that they complete. With
        moments in bf16 or 8 bits also ``rounding_seed``.
        """
        self._require_own_weights()
        state.adopt_masters(self.state, self._params(), self._tables.remainders)
        counts = {"applied": self.applied_steps.clone(), "skipped": self.skipped_steps.clone()}
        saved = {**super().state_dict(), "counts": counts}
        # a scheduler may have written numbers of NumPy's
        saved["param_groups"] = [plain(group) for group in saved["param_groups"]]
        params, remainders = self._params(), self._tables.remainders
        for i, param in enumerate(params):
            if saved["state"].get(i) is self.state.get(param, {}):  # no hook has replaced it
                own = remainders.saved_state(param, self.state[param])
                saved["state"][i] = state_kinds.to_save(own)
        if any(state.master_key(p, self._split) in state.SPLIT_KEYS.values() for p in params):
            saved["remainders"] = remainders.state_dict(params)
        if self._kind != torch.float32:
            saved["rounding_seed"] = self.rounding_seed
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """``state_dict`` as torch's optimizer of the same name has it: moments in fp32, exact.

        Without masters, averages and counts; see ``masters`` and ``averages``.
        """
        saved = self.fp32_state_dict()
        own = {*state.MASTERS, "average"}
        states = {
            i: {key: value for key, value in entry.items() if key not in own}
            for i, entry in saved["state"].items()
        }
        return {"state": states, "param_groups": saved["param_groups"]}

    def fp32_state_dict(self) -> dict[str, Any]:
        """``state_dict`` with moments in fp32; loaded into their kind again they are the same."""
        saved = self.state_dict()
        keys = [self._state_keys(g) for g in self.param_groups for _ in g["params"]]
        states = {i: state_kinds.widen(own, keys[i]) for i, own in saved["state"].items()}
        return {**saved, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or torch's for the same algorithm.

        Nothing is rounded, but moments that come in another kind than ``state_dtype``: once, to
        nearest.

        Without ``counts``, as in torch's states and those of ``torch.distributed.checkpoint``, the
        number of applied steps is the largest ``step`` of a parameter. torch's SGD keeps none:
        then it stays as it is.

        Raises:
            ValueError: another number of groups or of parameters in a group, as in torch, or state
                of another shape than its parameter, or 8-bit moments without their scales. Nothing
                has changed then.
        """

        self._require_own_weights()
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
            own = self._read(name)
            own.copy_(torch.as_tensor(count, device=own.device))
        self.rounding_seed = int(state_dict.get("rounding_seed", self.rounding_seed))
        self._loaded = LoadedState(self._loaded.number + 1, int(self.applied_steps))
        if "remainders" in state_dict:
            remainders = self._tables.remainders
            remainders.load_state_dict(self._params(), state_dict["remainders"])

    def masters(self) -> list[Tensor]:
        """The fp32 values of the parameters (fp64 of fp64), copies in the order of the groups.

        With them and ``state_dict`` a run goes on in plain PyTorch: copy them into the fp32 model,
        and load the state into torch's optimizer of the same name.
        """
        self._require_own_weights()
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
        self._require_own_weights()
        state.check_shapes(values, params)
        own = self._own_state
        state.adopt_masters(own, params, self._tables.remainders)
        for group in self.param_groups:
            keys = self._state_keys(group)
            state.allocate(own, group["params"], keys, self._kind, split=self._split)
        for p, value in zip(params, values, strict=True):
            state.set_master(p, own[p], value)
        self._tables.remainders.adopt(params)
