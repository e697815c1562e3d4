"""Whether the tensors of a step are those of the step before, and where their gradients are.

One call of the native library (``csrc/cpu/tensors.cpp``) reads all of them, gradients included, in
30 ns a tensor where Python takes 400: through torch's stable C ABI where that has a function. Where
it has none (gradients, the sign bit of lazy negations) the library reads torch's memory: every
Python tensor holds the address of its metadata, those hold dispatch keys and the address of what
autograd keeps. ``find_offsets`` looks where. Where a torch is made in another way, and without the
library, Python reads the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cpu
from fastmp.backends.cpu.structs import Status, TensorsArgs

_GETTERS = ("data_ptr", "dtype", "device_index", "dim", "sizes", "strides")
_GET_VERSION = "_ZNK2at10TensorBase8_versionEv"
_RAISE_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
_METADATA_WORDS = 24  # of a TensorImpl, at least: torch asserts its size
_AUTOGRAD_WORDS = 8  # of an AutogradMeta, at least: the gradient is behind a table and a string


class Native(NamedTuple):
    """The library's functions and the constants that they are called with."""

    library: ctypes.PyDLL
    constants: dict[str, int]


@cache
def native() -> Native | None:
    """None without the library, or where this torch's tensors are made in another way."""
    library, offsets = cpu.load_holding_gil(), find_offsets()
    torch_cpu = cpu.torch_library()
    if library is None or offsets is None or torch_cpu is None:
        return None
    try:
        functions = {
            f"get_{name}": getattr(torch_cpu, f"aoti_torch_get_{name}") for name in _GETTERS
        }
        functions["get_version"] = getattr(torch_cpu, _GET_VERSION)
        functions["raise_version"] = getattr(torch_cpu, _RAISE_VERSION)
    except AttributeError:
        return None
    functions["list_size"] = ctypes.pythonapi.PyList_Size
    functions["list_item"] = ctypes.pythonapi.PyList_GetItem
    constants = {k: ctypes.cast(f, ctypes.c_void_p).value or 0 for k, f in functions.items()}
    return Native(library, {"size": ctypes.sizeof(TensorsArgs), **offsets, **constants})


def find_offsets() -> dict[str, int] | None:
    """Where tensors keep what the stable ABI has no function for: fields of ``TensorsArgs``.

    None unless it is the same in tensors of several kinds.
    """
    a = torch.zeros(2, dtype=torch.float32, device="cpu")
    kinds = [a, torch._neg_view(a), a.to_sparse(), a.to("meta"), torch.nn.Parameter(a.bfloat16())]
    try:
        keys = [torch._C._dispatch_keys(t).raw_repr() for t in kinds]
    except AttributeError:
        return None
    object_words = Tensor.__basicsize__ // 8
    in_object = [_where(_words(id(t), object_words), t._cdata) for t in kinds]
    metadata = [_words(t._cdata, _METADATA_WORDS) for t in kinds]
    in_metadata = [_where(words, key) for words, key in zip(metadata, keys, strict=True)]
    handle, key_set = set.intersection(*in_object), set.intersection(*in_metadata)
    place = _gradient_place(torch.zeros(2, dtype=torch.float32, device="cpu"))
    leaves = [
        torch.zeros(2, dtype=torch.float32, device="cpu"),
        a[:1],
        torch.nn.Parameter(a.bfloat16()),
    ]  # autograd knows views
    if not handle or not key_set or place is None or not all(_is_place(place, t) for t in leaves):
        return None
    autograd, grad, no_grad = place
    return {
        "handle_offset": 8 * min(handle),
        "keys_offset": 8 * min(key_set),
        "autograd_offset": 8 * autograd,
        "grad_offset": 8 * grad,
        "no_grad": no_grad,
    }


def _gradient_place(t: Tensor) -> tuple[int, int, int] | None:
    """Words to the address of what autograd keeps, from there to the gradient, and that word
    without one: the words that change when a tensor gets them."""
    before = _words(t._cdata, _METADATA_WORDS)
    t.requires_grad_()
    after = _words(t._cdata, _METADATA_WORDS)
    new = [i for i, word in enumerate(before) if word == 0 and after[i] >> 12]  # an address
    if len(new) != 1:
        return None
    without = _words(after[new[0]], _AUTOGRAD_WORDS)
    t.grad = torch.ones_like(t)
    found = _where(_words(after[new[0]], _AUTOGRAD_WORDS), t.grad._cdata)
    return (new[0], min(found), without[min(found)]) if found else None


def _is_place(place: tuple[int, int, int], t: Tensor) -> bool:
    autograd, grad, no_grad = place
    address = _words(t.requires_grad_()._cdata, autograd + 1)[autograd]
    without = _words(address, grad + 1)[grad]
    t.grad = torch.ones_like(t)
    return without == no_grad and _words(address, grad + 1)[grad] == t.grad._cdata


def _words(address: int, count: int) -> list[int]:
    """The 64-bit words at an address."""
    return list((ctypes.c_uint64 * count).from_address(address))


def _where(words: list[int], value: int) -> set[int]:
    return {i for i, word in enumerate(words) if word == value}


class TensorReader:
    """Reads the parameters of a step and their gradients in one call; keeps none of them.

    Args:
        found: the library.
        groups: the parameters of each group, with and without gradients.
        addresses: receives those of the gradients, int64, one for each that there is.
    """

    @classmethod
    def of(cls, groups: Sequence[list[Tensor]], addresses: np.ndarray) -> TensorReader | None:
        """A reader that has read the gradients of these parameters; None: Python has to."""
        found = native()
        if found is None or not all(map(_is_plain, chain.from_iterable(groups))):
            return None
        reader = cls(found, groups, addresses)
        reader._args.write = 1
        known = reader.read(groups)
        reader._args.write = 0
        return reader if known else None

    def __init__(
        self, found: Native, groups: Sequence[list[Tensor]], addresses: np.ndarray
    ) -> None:
        params = list(chain.from_iterable(groups))
        tensors = [t for p in params for t in (p, p.grad) if t is not None]
        self._library = found.library
        self._lists = (ctypes.c_int64 * len(groups))()
        self._layout = np.empty(len(groups) + sum(7 + 2 * t.dim() for t in tensors), np.int64)
        self._handles = np.empty(len(addresses), np.int64)
        self._addresses = addresses
        self._args = TensorsArgs(
            **found.constants,
            lists=ctypes.addressof(self._lists),
            list_count=len(groups),
            layout=self._layout.ctypes.data,
            words=len(self._layout),
            addresses=addresses.ctypes.data,
            address_stride=addresses.strides[0] // 8,
            handles=self._handles.ctypes.data,
            with_grad=len(addresses),
        )
        self._pointer = ctypes.byref(self._args)

    def read(self, groups: Sequence[list[Tensor]]) -> bool:
        """Write the gradients' addresses, if the tensors and all layouts are the same as at first.

        The parameters are the same objects at the same addresses then. False: Python has to tell.
        """
        if len(groups) != len(self._lists):
            return False
        for i, params in enumerate(groups):
            if type(params) is not list:
                return False
            self._lists[i] = id(params)
        status = self._library.fastmp_tensors(self._pointer)
        return bool(status == Status.OK and self._args.same)

    @property
    def version_sum(self) -> int:
        """Of the parameters that have a gradient, when they were last read."""
        return int(self._args.version_sum)

    def raise_versions(self) -> None:
        """As ``torch.autograd.graph.increment_version``, of the parameters that have a gradient."""
        self._library.fastmp_raise_versions(self._pointer)


def _is_plain(param: Tensor) -> bool:
    """Whether its ``grad`` is torch's own attribute, and its version is counted."""
    kind, disabled = type(param), torch._C._disabled_torch_function_impl
    own = kind in (Tensor, torch.nn.Parameter) or (
        kind.grad is Tensor.grad and kind.__torch_function__ is disabled
    )
    return own and not param.is_inference()


def layouts(tensors: Any) -> list[Any]:
    """What Python compares: None for a sparse tensor, which has no strides."""
    strided = torch.strided
    return [
        (t.dtype, t.shape, t.stride(), t.is_neg()) if t.layout == strided else None for t in tensors
    ]
