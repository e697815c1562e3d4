"""Ctrl-C and SIGTERM: noted inside the block, once."""

import os
import signal
import threading

import pytest

from fastmp.training import signals


@pytest.fixture(autouse=True)
def _default_handlers():
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_handler_comes_back(number):
    before = signal.getsignal(number)
    with signals.deferred() as asked:
        assert asked() == 0
        signal.raise_signal(number)
        assert asked() == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)],
)
def test_the_second_does_not_wait(number, kind):
    with signals.deferred():
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt) as stop:
            signal.raise_signal(number)
    assert stop.type is kind is type(signals.reason(number))


def test_somebody_elses_handler_stays():
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("theirs"))
    with signals.deferred() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
    assert heard == ["theirs"]


def test_another_thread_has_no_signals():
    entered = []

    def work():
        with signals.deferred() as asked:
            entered.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [0]
