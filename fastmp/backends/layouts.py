"""Whether the tensors of a step are laid out as the step before, and where the gradients are.

One call of the native library (``csrc/cpu/tensors.cpp``) reads all of them through torch's stable C
ABI, in 30 ns a tensor where Python takes 400. A handle of that ABI is the address of a pointer to
the tensor's metadata, and every Python tensor holds that pointer: ``find_offsets`` looks where.
The ABI has no sign bit of lazy negations; the dispatch keys, a word of the metadata, have it. Where
a torch keeps them elsewhere, and without the library, Python reads the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmp.backends import cpu
from fastmp.backends.cpu.structs import Status, TensorsArgs

_GETTERS = ("data_ptr", "dtype", "device_index", "dim", "sizes", "strides")
_METADATA_WORDS = 24  # of a TensorImpl, at least: torch asserts its size


class Native(NamedTuple):
    """The library's function and the constants that it is called with."""

    call: Callable[..., int]
    constants: dict[str, int]


@cache
def native() -> Native | None:
    """None without the library, or where this torch's tensors are laid out in another way."""
    library, offsets = cpu.load_holding_gil(), find_offsets()
    torch_cpu = cpu.torch_library()
    if library is None or offsets is None or torch_cpu is None:
        return None
    try:
        getters = [getattr(torch_cpu, f"aoti_torch_get_{name}") for name in _GETTERS]
    except AttributeError:
        return None
    constants = {
        f"get_{name}": ctypes.cast(getter, ctypes.c_void_p).value or 0
        for name, getter in zip(_GETTERS, getters, strict=True)
    }
    handle, keys = offsets
    constants |= {"handle_offset": handle, "keys_offset": keys}
    return Native(library.fastmp_tensors, {"size": ctypes.sizeof(TensorsArgs), **constants})


def find_offsets() -> tuple[int, int] | None:
    """Bytes to the metadata's address in a Python tensor, and to the dispatch keys in those.

    None unless they are the same in tensors of several kinds, whose keys all differ.
    """
    a = torch.zeros(2)
    kinds = [a, torch._neg_view(a), a.to_sparse(), a.to("meta"), torch.nn.Parameter(a.bfloat16())]
    try:
        keys = [torch._C._dispatch_keys(t).raw_repr() for t in kinds]
    except AttributeError:
        return None
    in_object = [_where(id(t), Tensor.__basicsize__ // 8, t._cdata) for t in kinds]
    in_metadata = [
        _where(t._cdata, _METADATA_WORDS, key) for t, key in zip(kinds, keys, strict=True)
    ]
    handle, key_set = set.intersection(*in_object), set.intersection(*in_metadata)
    return (8 * min(handle), 8 * min(key_set)) if handle and key_set else None


def _where(address: int, words: int, value: int) -> set[int]:
    """The indices of the 64-bit words at an address that have this value."""
    memory = (ctypes.c_uint64 * words).from_address(address)
    return {i for i, word in enumerate(memory) if word == value}


class Layouts:
    """Dtypes, shapes and strides of parameters and gradients; keeps no tensor.

    Of the parameters also which they are and where.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self._expected = _layouts(chain(params, grads))
        self._native = native()
        if self._native is None or not params:
            self._native = None
            return
        words = sum(6 + 2 * t.dim() for t in chain(params, grads))
        self._layout = np.empty(words, np.int64)
        self._addresses = np.empty(len(grads), np.int64)
        self._args = TensorsArgs(
            **self._native.constants,
            fixed=len(params),
            bound=len(grads),
            layout=self._layout.ctypes.data,
            words=words,
            addresses=self._addresses.ctypes.data,
            write=1,
        )
        if self._call(params, grads) is None:
            self._native = None
        self._args.write = 0

    def addresses(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> np.ndarray | None:
        """The gradients' addresses, valid until the next call, if the layouts are the same.

        None: Python has to tell.
        """
        fits = len(params) == len(grads) and self._native and len(grads) == len(self._addresses)
        return self._call(params, grads) if fits else None

    def match(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether these, as many, have the same layouts, wherever they are."""
        return _layouts(chain(params, grads)) == self._expected

    def _call(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> np.ndarray | None:
        count = len(params) + len(grads)
        objects = np.fromiter(chain(params, grads), object, count)  # holds them during the call
        self._args.objects = objects.ctypes.data
        assert self._native is not None
        status = self._native.call(ctypes.byref(self._args))
        return self._addresses if status == Status.OK and self._args.same else None


def _layouts(tensors: Any) -> list[Any]:
    """None for a sparse one, which has no strides."""
    strided = torch.strided
    return [
        (t.dtype, t.shape, t.stride(), t.is_neg()) if t.layout == strided else None for t in tensors
    ]
