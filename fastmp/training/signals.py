"""Ctrl-C and SIGTERM between two steps, never inside one: what is saved then is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a scheduler, a container or ``torchrun`` wants the process to go."""


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """In the block a first Ctrl-C or SIGTERM is only noted; a second one has its usual effect.

    The yielded function gives the number of the signal that came, 0 for none. Outside the main
    thread, or where somebody else handles a signal, everything stays as it is.
    """
    asked = 0
    kept = {}
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        kept = {number: old for number, old in usual.items() if signal.getsignal(number) is old}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise reason(number)
        asked = number

    for number in kept:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, old in kept.items():
            signal.signal(number, old)


def reason(number: int) -> KeyboardInterrupt:
    """The exception that stands for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
