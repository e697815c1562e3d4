"""``python -m fastmp`` and the ``fastmp`` script."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings

import fastmp

BROKEN_PIPE = 128 + 13  # exit code of a process that SIGPIPE ended, as shells report it


def main() -> int:
    """Run the command line; the exit code."""
    # without the line of the source that warns, which says nothing to a user
    warnings.formatwarning = lambda message, *_, **__: f"fastmp: warning: {message}\n"
    threading.excepthook = _thread_failed
    try:
        return _run()
    except BrokenPipeError:  # fastmp ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed once more at exit
        return BROKEN_PIPE


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """On a full disk TensorBoard's thread fails, and hands its error to the next call as well."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _run() -> int:
    from fastmp import cli

    if signal.getsignal(signal.SIGINT) is fastmp._end_at_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main(sys.argv[1:])
    finally:
        if sys.stdout is not None:  # it is closed
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
