"""The kernel of each operation on each type of device; unsupported calls fall back here.

An operation is defined once, in ``fastmp.ops``: ``define`` takes its schema, fake and reference. A
backend is one folder, ``fastmp/backends/<backend>/``. Its file ``<operation>.py`` registers the
kernels of that operation and is imported by ``define``. Calls that no kernel supports run on the
reference in plain PyTorch. With ``FASTMP_BACKEND=cpu|triton|cuda`` that backend must be available.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: The folders beside this file.
BACKENDS = tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")))


class OpBackend(NamedTuple):
    """The backend that serves an operation on a kind of device, and the reason."""

    op: str
    device: str
    backend: str
    reason: str


class TorchOp(NamedTuple):
    """An entry point of an operation: ``torch.ops.fastmp.<name>``.

    Attributes:
        schema: as ``torch.library`` reads it, "<name>(Tensor input, ...) -> ...". torch.compile
            finds code kept on disk by the name: other arguments or outputs need another one.
        reference: the operation in plain PyTorch, for any device.
        fake: shapes and dtypes of its results.
        check: raises where a value is wrong; called before a kernel. The reference calls it itself.
        spec: a NamedTuple of the schema's last arguments. Kernels and the functions above take it
            in their place.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None] | None = None
    spec: Any = None

    def packed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with the arguments of the schema."""
        if self.spec is None:
            return function
        spec, count = self.spec, len(self.spec._fields)
        return lambda *args: function(*args[:-count], spec(*args[-count:]))


class _Kernel(NamedTuple):
    backend: str
    call: Callable[..., Any] | None  # None: the backend cannot run
    supports: Callable[..., str | None]
    detail: str


class _Availability(NamedTuple):
    available: bool
    reason: str


_library = torch.library.Library("fastmp", "FRAGMENT")
_torch_ops: dict[str, TorchOp] = {}
_operations: dict[str, tuple[str, ...]] = {}  # the names to register kernels for
_kernels: dict[tuple[str, str], _Kernel] = {}  # by name and type of device
_narrow_kernels: dict[tuple[str, str], _Kernel] = {}  # of some calls, asked first
_policies: dict[tuple[str, str, str], Callable[..., bool]] = {}  # by name, policy, type of device
_backends: dict[str, _Availability] = {}


# ---- operations ----


def define(operation: str, *torch_ops: TorchOp, kernels: Sequence[str] = ()) -> None:
    """Define an operation and import its kernels.

    Args:
        operation: its name in the report and that of its files, ``backends/*/<operation>.py``.
        torch_ops: its entry points. None: it is no torch operation, and calls ``select``.
        kernels: names for ``select``, if there are several; a device has kernels of some.
    """
    for op in torch_ops:
        name = op.schema.partition("(")[0]
        _library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, op.packed(op.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmp::{name}", op.packed(op.fake), lib=_library)
        _torch_ops[name] = op
    names = tuple(op.schema.partition("(")[0] for op in torch_ops)
    _operations[operation] = names or tuple(kernels) or (operation,)
    for backend in BACKENDS:
        module = f"fastmp.backends.{backend}.{operation}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


# ---- kernels ----


def _anything(*_: Any) -> str | None:
    return None


def register(
    op: str,
    device: str,
    kernel: Callable[..., Any],
    *,
    backend: str,
    supports: Callable[..., str | None] = _anything,
    detail: str = "",
    narrow: bool = False,
    **policies: Callable[..., bool],
) -> None:
    """Let ``kernel`` serve ``op`` on a type of device.

    Args:
        op: the name of an entry point, "linear_backward", or of an operation without any.
        device: "cpu", "cuda", ...
        kernel: takes the arguments of the reference.
        backend: its name; ``mark_available`` or ``mark_unavailable`` has been called for it.
        supports: takes them too; None, or the reason why the kernel cannot serve this call.
        detail: added to the backend's reason in the report; for a narrow kernel, its calls,
            or nothing if another entry point names them.
        narrow: the kernel serves some calls of a torch operation that another backend, registered
            after it, serves in general.
        policies: decisions of this device, by the names under which ``ask`` finds them.
    """
    available, _ = _backends[backend]
    found = _Kernel(backend, kernel if available else None, supports, detail)
    if narrow:
        _narrow_kernels[op, device] = found
        return
    _kernels[op, device] = found
    for name, decide in policies.items():
        _policies[op, name, device] = decide
    if available and op in _torch_ops:
        call = serve(op, kernel, supports, _narrow_kernels.get((op, device)))
        torch.library.impl(f"fastmp::{op}", device, call, lib=_library)


def serve(
    op: str,
    kernel: Callable[..., Any],
    supports: Callable[..., str | None],
    narrow: _Kernel | None = None,
) -> Callable[..., Any]:
    """The implementation of a torch operation: a kernel, or the reference where unsupported.

    Args:
        op: the name of an entry point.
        kernel, supports: as in ``register``.
        narrow: asked first.
    """
    entry = _torch_ops[op]
    reference, check = entry.reference, entry.check

    def call(*args: Any) -> Any:
        chosen = kernel
        if narrow is not None and narrow.call is not None and narrow.supports(*args) is None:
            chosen = narrow.call
        elif supports(*args) is not None:
            return reference(*args)
        if check is not None:
            check(*args)
        return chosen(*args)

    return entry.packed(call)


def select(op: str, device: torch.device, *args: Any) -> tuple[Callable[..., Any] | None, str]:
    """The kernel for a call of an operation that is no torch operation, and the reason.

    Args:
        op: the operation.
        device: where its tensors are.
        args: for ``supports``.

    Returns:
        the kernel, or None: use the reference.
    """
    kernel = _kernels.get((op, device.type))
    if kernel is None:
        return None, f"no kernel for {device.type}"
    if kernel.call is None:
        return None, _backends[kernel.backend].reason
    reason = kernel.supports(*args)
    return (kernel.call, _backends[kernel.backend].reason) if reason is None else (None, reason)


def ask(op: str, policy: str, device: torch.device, *args: Any, default: bool) -> bool:
    """A decision that belongs to the backend of a device; ``default`` if it registered none.

    It does not depend on whether the backend can run: the reference then takes the same path.
    """
    decide = _policies.get((op, policy, device.type))
    return default if decide is None else decide(*args)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.is_cpu


# ---- backends ----


def forced_backend() -> str | None:
    """The backend demanded by ``FASTMP_BACKEND``, or None.

    Raises:
        ValueError: the variable names a backend that does not exist.
    """
    name = os.environ.get("FASTMP_BACKEND", "").strip().lower() or None
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"FASTMP_BACKEND must be one of {', '.join(BACKENDS)} (or unset), got {name!r}"
        )
    return name


def mark_available(backend: str, reason: str) -> None:
    """Note that a backend can run; ``reason`` names its library, version or hardware."""
    _backends[backend] = _Availability(True, reason)


def mark_unavailable(backend: str, reason: str, *, warn: bool = True, fix: str = "") -> None:
    """Note that a backend cannot run, and warn; ``fix`` is appended to the warning.

    Raises:
        RuntimeError: ``FASTMP_BACKEND`` demands it.
    """
    if forced_backend() == backend:
        raise RuntimeError(f"FASTMP_BACKEND={backend}, but {reason}")
    _backends[backend] = _Availability(False, reason)
    if warn:
        text = f"fastmp runs on its slow reference backend ({reason}). {fix}"
        warnings.warn(text.rstrip(), RuntimeWarning, stacklevel=3)


def report() -> list[OpBackend]:
    """The backend of each operation on each type of device, with the reason, one row each."""
    devices = sorted({device for _, device in _kernels})
    return [_row(operation, device) for operation in sorted(_operations) for device in devices]


def _row(operation: str, device: str) -> OpBackend:
    names = _operations[operation]
    kernel = next(filter(None, (_kernels.get((name, device)) for name in names)), None)
    if kernel is None:
        reason = f"no kernel for {device}: plain PyTorch"
        return OpBackend(operation, device, "reference", reason)
    available, reason = _backends[kernel.backend]
    if not available:
        return OpBackend(operation, device, "reference", reason)
    reason = f"{reason}; {kernel.detail}" if kernel.detail else reason
    for narrow in filter(None, (_narrow_kernels.get((name, device)) for name in names)):
        if narrow.detail and narrow.call is not None and _backends[narrow.backend].available:
            reason += f"; {narrow.detail}: {narrow.backend}"
    return OpBackend(operation, device, kernel.backend, reason)
