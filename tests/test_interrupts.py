"""A request to end a command, and the processes that the command has forked."""

import multiprocessing
import signal

import pytest

from nnunet_dyn.interrupts import interruptible

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORKS = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")


@pytest.fixture(autouse=True)
def _python_handlers():
    """A shell starts what runs in its background with interrupts ignored."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def of_this_process(_):
    return [signal.getsignal(number) for number in SIGNALS]


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with interruptible(), interruptible():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_request_to_terminate_comes_once_and_an_interrupt_each_time():
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


@FORKS
def test_forked_processes_have_the_handlers_of_before():
    """A pool's workers that handled the request in Python hung now and then, and the pool with them."""
    before = of_this_process(None)
    with interruptible():
        inside = of_this_process(None)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            seen = pool.map(of_this_process, range(4))
        assert of_this_process(None) == inside
    assert seen == [before] * 4


@FORKS
def test_workers_that_a_pool_starts_in_its_thread_have_them_too():
    before = of_this_process(None)
    with interruptible(), multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        assert pool.map(of_this_process, range(3), chunksize=1) == [before] * 3


@FORKS
def test_pools_end_when_they_are_told_to():
    """In a process of its own, which can be ended if one does not."""

    def many():
        with interruptible():
            for _ in range(20):
                with multiprocessing.get_context("fork").Pool(8) as pool:
                    assert pool.map(abs, [-1]) == [1]

    process = multiprocessing.get_context("fork").Process(target=many)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
