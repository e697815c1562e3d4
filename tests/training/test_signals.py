"""Ctrl-C, SIGTERM and SIGHUP: recorded inside the block, once."""

import os
import signal
import threading

import pytest

from fastmp.distributed.rendezvous import World
from fastmp.training import signals


@pytest.fixture(autouse=True)
def _default_handlers():
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop_signal():
    return signals.StopSignal(World())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_recorded_and_the_handler_comes_back(stop_signal, number):
    before = signal.getsignal(number)
    with stop_signal.deferred():
        assert stop_signal.received == 0
        signal.raise_signal(number)
        assert stop_signal.received == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, signals.Terminated),
        (signal.SIGHUP, signals.Terminated),
    ],
)
def test_the_second_does_not_wait(stop_signal, number, kind):
    with stop_signal.deferred():
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt) as stop:
            signal.raise_signal(number)
        assert stop.type is kind
        for stops in (stop_signal.poll, stop_signal.exchange, stop_signal.raise_if_agreed):
            with pytest.raises(kind):
                stops()


def test_a_stop_is_over_when_the_block_ends(stop_signal):
    with stop_signal.deferred():
        signal.raise_signal(signal.SIGINT)
    stop_signal.poll()
    assert stop_signal.received == 0


def test_another_handler_stays(stop_signal):
    handled = []
    signal.signal(signal.SIGINT, lambda *_: handled.append("theirs"))
    with stop_signal.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stop_signal.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.received == signal.SIGTERM
    assert handled == ["theirs"]


def test_another_thread_has_no_signals(stop_signal):
    received = []

    def work():
        with stop_signal.deferred():
            received.append(stop_signal.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [0]


def test_a_process_under_nohup_goes_on(stop_signal):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signal.deferred():
        signal.raise_signal(signal.SIGHUP)
        assert stop_signal.received == 0
