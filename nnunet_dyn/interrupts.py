"""Requests to end a command."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Requests to terminate within so many seconds are one, as GNU timeout sends it: it must not end its own clean-up.
_SAME = 10.0


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a request to terminate, or a closed terminal, unwind like Ctrl-C: nothing half-written or running stays.

    What this process was started to ignore, as under ``nohup``, it goes on to ignore.
    """

    stopped = float("-inf")

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if number != signal.SIGINT and time.monotonic() - stopped < _SAME:
            return
        stopped = time.monotonic()
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
