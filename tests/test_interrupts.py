"""A request to end a command, and the processes that the command has forked.

Each in a process of its own: the signals are for a whole process, and this one runs the other tests.
"""

import multiprocessing
import subprocess
import sys

import pytest

FORKS = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
START = """
import multiprocessing, signal
from nnunet_dyn.interrupts import interruptible

# A shell starts what runs in its background with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)

def handlers(*_):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

before = handlers()
"""


def run(script):
    """What ``script`` has printed, in words."""
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_handlers_are_given_back():
    changed_and_given_back = run("""
with interruptible(), interruptible():
    print(not set(before) & set(handlers()))
print(handlers() == before)
""")
    assert changed_and_given_back == ["True", "True"]


def test_a_request_to_terminate_comes_once_and_an_interrupt_each_time():
    caught = run("""
with interruptible():
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            print(number.name)
""")
    assert caught == ["SIGTERM", "SIGINT", "SIGINT"]


@FORKS
def test_forked_processes_have_the_handlers_of_before():
    """A pool's workers that handled the request in Python hung now and then, and the pool with them."""
    in_pool_and_thread_and_parent = run("""
with interruptible():
    during = handlers()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(handlers, range(4)) == [before] * 4)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # forks in a thread, too
        print(pool.map(handlers, range(3), chunksize=1) == [before] * 3)
    print(handlers() == during)
""")
    assert in_pool_and_thread_and_parent == ["True"] * 3


@FORKS
def test_pools_end_when_they_are_told_to():
    results = run("""
with interruptible():
    for _ in range(20):
        with multiprocessing.get_context("fork").Pool(8) as pool:
            print(*pool.map(abs, [-1]))
""")
    assert results == ["1"] * 20
