import signal

import jax
import pytest

from fope_jax.processes.signals import SIGNALS

pytest_plugins = ("tests.train.fixtures",)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program holds memory maps (some 25 on a CPU), and Linux gives a process 65,530:
    a worker that keeps those of the whole suite is killed in the middle of a compilation."""
    yield
    jax.clear_caches()


@pytest.fixture
def as_in_a_terminal():
    """Where the tests themselves run in the background or under nohup, SIGINT or SIGHUP is
    ignored, and would be in what they test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
