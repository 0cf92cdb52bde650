"""Requests to end a command."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Requests to terminate within so many seconds are one, as GNU timeout sends it: it must not end its own clean-up.
_SAME = 10.0
_Handlers = dict[int, object]
#: By signal, the handlers of before and during each :func:`interruptible` that is under way.
_under_way: list[tuple[_Handlers, _Handlers]] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a request to terminate, or a closed terminal, unwind like Ctrl-C: nothing half-written or running stays.

    What this process was started to ignore, as under ``nohup``, it goes on to ignore. Processes that it forks have the
    handlers of before, so that a request to terminate ends them at once.
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
    entry = before, dict.fromkeys(before, stop)
    _under_way.append(entry)
    try:
        _set(entry[1])
        yield
    finally:
        _set(before)
        if entry in _under_way:  # not in a forked process
            _under_way.remove(entry)


def _set(handlers: _Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# A forked process must not have ``stop``, not even at its start: Python only notes a signal, and a worker of
# multiprocessing that is about to wait for a task would wait for ever, as would nnU-Net's pool for its end. So the
# handlers of before are there while a process is forked. Only the main thread can set them.


def _before_fork() -> None:
    if threading.current_thread() is threading.main_thread():
        for before, _ in reversed(_under_way):
            _set(before)


def _after_fork() -> None:
    if threading.current_thread() is threading.main_thread():
        for _, during in _under_way:
            _set(during)


def _in_fork() -> None:
    while _under_way:
        _set(_under_way.pop()[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_fork)
