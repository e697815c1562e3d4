"""Which remainders still belong to the 16-bit weights beside them.

A remainder completes one weight to its master; beside another weight it is noise of up to half a
unit in the last place. Every in-place change that autograd sees raises a tensor's version. At the
first one that is not the step's own, the tensor's remainders are dropped, and from then on a copy
of its weights (2 bytes a parameter) tells after every step which elements were changed, so that a
mask or a clamp applied every step leaves the others their remainders. A change through ``.data``
is not seen: the old remainder stays, and the master rounds to the new weight all the same.

Between a load and the first step the order in which model and optimizer are loaded must not matter,
nor a broadcast of equal weights: there a checksum of the weights decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastmp.ops.update import current_master

_CHUNK = 2**20  # words of 8 bytes that a checksum takes at a time: 40 MB of temporaries
_version = attrgetter("_version")


def checksum(weight: Tensor) -> Tensor:
    """A hash of the bits of a 16-bit tensor in the order of its indices: 0-d int64, on its device.

    The same on every device. One changed element always changes it.
    """
    bits = weight.detach().reshape(-1).view(torch.int16)
    words = torch.zeros(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    words.view(torch.int16)[: bits.numel()].copy_(bits)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        index = torch.arange(start, start + part.numel(), device=bits.device)
        total += (_mix(part) * (2 * _mix(index * 0x1E3779B97F4A7C15) + 1)).sum()
    return total


def _mix(words: Tensor) -> Tensor:
    """Injective; the upper half of a word reaches the lower one."""
    return words ^ ((words >> 32) & 0xFFFFFFFF)


class Remainders:
    """The 16-bit weights with remainders, as the optimizer's last step left them."""

    def __init__(self, split_fp16: bool = False) -> None:
        self.split_fp16 = split_fp16  # fp16 weights have remainders too
        self._params: list[Tensor] = []  # of the current table
        self._remainders: list[Tensor] = []
        self._owners: dict[int, Tensor] = {}  # by the id of a remainder
        self._indices: dict[Tensor, int] = {}
        self._versions: list[int] = []  # when they were last read
        self._steps = 0  # since then, each of which raised every version by 1
        self._others: dict[Tensor, int] = {}  # versions of parameters that are not in the table
        self._copies: dict[Tensor, Tensor] = {}  # of weights that were changed from outside once
        self._checksums: dict[Tensor, Tensor] = {}  # loaded, not yet compared

    def current(self, param: Tensor, remainder: Tensor) -> Tensor:
        """``remainder``, or a copy that is 0 where the weight was changed since the last step."""
        expected = self._checksums.get(param)
        if expected is not None:
            return remainder * (checksum(param) == expected)
        if self._is_of_another(param, remainder):
            return torch.zeros_like(remainder)
        if not self._is_changed(param):
            return remainder
        copy = self._copies.get(param)
        if copy is None:
            return torch.zeros_like(remainder)
        same = copy.view(torch.int16) == param.detach().view(torch.int16)
        return torch.where(same, remainder, 0)

    def _is_of_another(self, param: Tensor, remainder: Tensor) -> bool:
        """Whether code outside moved a state from one parameter to another that replaces it."""
        return self._owners.get(id(remainder), param) is not param

    def _is_changed(self, param: Tensor) -> bool:
        index = self._indices.get(param)
        if index is None:
            return self._others.get(param, param._version) != param._version
        return self._versions[index] + self._steps != param._version

    # ---- around a step ----

    def use(self, params: list[Tensor], remainders: list[Tensor]) -> None:
        """The next steps change these weights and their remainders."""
        for param, remainder in zip(params, remainders, strict=True):
            if self._is_of_another(param, remainder):
                remainder.zero_()
        self._owners = dict(zip(map(id, remainders), params, strict=True))
        now = (version + self._steps for version in self._versions)
        known = {**self._others, **dict(zip(self._params, now, strict=True))}
        self._params, self._remainders = params, remainders
        self._indices = {p: i for i, p in enumerate(params)}
        self._versions = [known.pop(p, p._version) for p in params]
        self._steps = 0
        self._others = {p: v for p, v in known.items() if p.dtype in self._dtypes()}

    def drop_stale(self) -> None:
        """Before a step: set remainders to 0 where weights were changed since the last one.

        Raises:
            RuntimeError: such a change just before the capture of a CUDA graph, whose every replay
                would drop them.
        """
        loaded = self._checksums and any(p in self._checksums for p in self._params)
        # Versions only rise: their sum is as expected if each of them is.
        expected = sum(self._versions) + self._steps * len(self._params)
        if not loaded and sum(map(_version, self._params)) == expected:
            return
        if self._params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "16-bit weights were changed, or a checkpoint was loaded, since the last step: "
                "expected one step before the capture of a CUDA graph"
            )
        for param, remainder in zip(self._params, self._remainders, strict=True):
            valid = self.current(param, remainder)
            if valid is not remainder:
                remainder.copy_(valid)
            loaded = self._checksums.pop(param, None) is not None
            if not loaded and self._is_changed(param) and param not in self._copies:
                self._copies[param] = torch.empty_like(param)
        self._read_versions()

    def record(self, raised_by_one: bool) -> None:
        """After a step, which raised every version by one if that is known: these weights belong
        to the remainders."""
        self._steps += 1
        if not raised_by_one:
            self._read_versions()
        if self._copies:
            self._copy(self._params)

    def _read_versions(self) -> None:
        self._versions, self._steps = list(map(_version, self._params)), 0

    def adopt(self, params: list[Tensor]) -> None:
        """The remainders of these parameters were computed from the weights as they are."""
        self._checksums.clear()
        self._owners.clear()
        self._read_versions()
        self._others = {p: p._version for p in params}
        self._copy(params)

    def _copy(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param in self._copies:
                self._copies[param].copy_(param.detach())

    def adopt_cast(self, param: Tensor) -> None:
        """As ``adopt``, of a parameter that was cast."""
        self._checksums.pop(param, None)
        if param in self._indices:
            self._versions[self._indices[param]] = param._version - self._steps
        else:
            self._others[param] = param._version
        if self._copies.pop(param, None) is not None and param.dtype in self._dtypes():
            self._copies[param] = param.detach().clone()

    # ---- saving and loading ----

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float16) if self.split_fp16 else (torch.bfloat16,)

    def before_cast(self, param: Tensor, remainder: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A remainder of weights of ``dtype``, which ``param`` had before it was cast.

        As ``current``; None: it belongs to other weights. Between fp16 and bf16 a checksum tells
        nothing: one underflows where the other does not.
        """
        expected = self._checksums.pop(param, None)
        weight = param.detach().to(dtype)
        if expected is not None and (param.dtype.itemsize > 2 or param.dtype == dtype):
            return remainder if bool(checksum(weight) == expected) else None
        if not self._is_changed(param):
            return remainder
        copy = self._copies.get(param)
        return None if copy is None else torch.where(copy == weight, remainder, 0)

    def valid_state(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` with the master or remainder that the next step starts from."""
        for key, dtype in (("remainder", torch.bfloat16), ("remainder_fp16", torch.float16)):
            if key in state and param.dtype == dtype:
                current = self.current(param, state[key])
                return state if current is state[key] else {**state, key: current}
        if "master" in state and param.dtype == torch.float16:
            current = current_master(param.detach(), state["master"])
            unchanged = torch.equal(current, state["master"])
            return state if unchanged else {**state, "master": current}
        return state

    def saved_state(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """As ``valid_state``; all of a loaded one, whose weights may still be loaded."""
        return state if param in self._checksums else self.valid_state(param, state)

    def state_dict(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        """What ``load_state_dict`` needs to know about the weights, one element a parameter.

        ``checksum``: int64, of the weights that the remainders belong to, else 0.
        ``edited``: bool, whether the weights were changed from outside before.
        """
        split = [p.dtype in self._dtypes() for p in params]
        sums = [
            self._checksums[p] if p in self._checksums else checksum(p)
            for p, is_split in zip(params, split, strict=True)
            if is_split
        ]
        found = torch.zeros(len(params), dtype=torch.int64, device="cpu")
        if sums:
            found[torch.tensor(split, dtype=torch.bool, device="cpu")] = torch.stack(
                [s.to(sums[0].device) for s in sums]
            ).cpu()
        edited = [
            p in self._copies or (is_split and self._is_changed(p))
            for p, is_split in zip(params, split, strict=True)
        ]
        return {
            "checksum": found,
            "edited": torch.tensor(edited, dtype=torch.bool, device="cpu"),
        }

    def load_state_dict(self, params: Sequence[Tensor], saved: Mapping[str, Tensor]) -> None:
        """Compare the weights with the checksums before they are next used."""
        rows = zip(params, saved["checksum"], saved["edited"].tolist(), strict=False)
        for param, expected, edited in rows:
            if expected != 0:
                self._checksums[param] = expected.to(param.device)
            if edited:
                self._copies[param] = torch.empty_like(param)
