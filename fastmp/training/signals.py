"""Ctrl-C, SIGTERM and SIGHUP take effect between two steps, so that the saved state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastmp.distributed.rendezvous import World


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: a scheduler, a container or ``torchrun`` ends the process.

    Or SIGHUP: its terminal was closed.
    """


_TERMINATING = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP


class StopSignal:
    """A signal to one rank, on which all ranks stop after the same step.

    Attributes:
        received: number of the signal that this process received; 0: none.
        agreed: number of the signal that all ranks know of; 0: none.
    """

    def __init__(self, world: World) -> None:
        self.received = 0
        self.agreed = 0
        self._world = world

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block a first such signal is recorded; a second one has its usual effect.

        Outside the main thread nothing changes, nor for a signal that already has a handler or is
        ignored, as nohup ignores SIGHUP.
        """
        self.received = self.agreed = 0
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            usual: dict[int, Any] = dict.fromkeys(_TERMINATING, signal.SIG_DFL)
            usual[signal.SIGINT] = signal.default_int_handler
            replaced = {n: old for n, old in usual.items() if signal.getsignal(n) is old}
        for number in replaced:
            signal.signal(number, self._record)
        try:
            yield
        finally:
            self.received = 0
            for number, old in replaced.items():
                signal.signal(number, old)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise _interrupt(number)
        self.received = number

    def exchange(self) -> None:
        """Stop all ranks if one received a signal; every rank must call it."""
        self.agreed = self._world.max(self.received)
        self.raise_if_agreed()

    def raise_if_agreed(self) -> None:
        """Raise ``KeyboardInterrupt`` or ``Terminated`` on all ranks."""
        if self.agreed:
            raise _interrupt(self.agreed)

    def poll(self) -> None:
        """Without other ranks, raise as soon as a signal was received."""
        if self._world.size == 1:
            self.agreed = self.received
            self.raise_if_agreed()


def _interrupt(number: int) -> KeyboardInterrupt:
    return Terminated() if number in _TERMINATING else KeyboardInterrupt()
