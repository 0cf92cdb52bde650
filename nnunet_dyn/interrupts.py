"""Requests to end a command."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a request to terminate, or a closed terminal, unwind like Ctrl-C: nothing half-written or running stays.

    What this process was started to ignore, as under ``nohup``, it goes on to ignore.
    """

    def stop(number: int, frame: object) -> None:
        for other in before:
            if other != signal.SIGINT:  # sent twice, as by GNU timeout, it must not end the clean-up
                signal.signal(other, signal.SIG_IGN)
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
