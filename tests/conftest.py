import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program holds memory maps (some 25 on a CPU), and Linux gives a process 65,530:
    a worker that keeps those of the whole suite is killed in the middle of a compilation."""
    yield
    jax.clear_caches()
