"""Ctrl-C: put off inside the block, once."""

import signal
import threading

import pytest

from fastmp import interrupts


@pytest.fixture(autouse=True)
def _default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_waits_for_the_check():
    with interrupts.deferred() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_second_does_not_wait():
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_somebody_elses_handler_stays():
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("theirs"))
    with interrupts.deferred() as check:
        signal.raise_signal(signal.SIGINT)
        check()
    assert heard == ["theirs"]


def test_another_thread_has_no_signals():
    entered = []

    def work():
        with interrupts.deferred() as check:
            check()
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
