"""Requests to end a command."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Requests to terminate within so many seconds are one, as GNU timeout sends it: it must not end its own clean-up.
_SAME = 10.0
#: By signal, the handlers to go back to, of each :func:`interruptible` that is under way.
_replaced: list[dict[int, object]] = []
_forking = threading.local()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a request to terminate, or a closed terminal, unwind like Ctrl-C: nothing half-written or running stays.

    What this process was started to ignore, as under ``nohup``, it goes on to ignore. Processes that it forks are ended
    at once.
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
    _set(dict.fromkeys(before, stop))
    _replaced.append(before)
    try:
        yield
    finally:
        _set(before)
        if before in _replaced:  # not in a forked process
            _replaced.remove(before)


def _set(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# A forked process must not have ``stop``: Python only notes a signal, and a worker of multiprocessing that is about to
# wait for a task would wait for ever, as would nnU-Net's pool for its end. No signal may come before it is removed.


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number for each in _replaced for number in each})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_fork() -> None:
    while _replaced:
        _set(_replaced.pop())
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_fork)
