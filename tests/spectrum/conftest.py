"""Small made-up runs, as the tests of the report use, and the numbers of the demo."""

import pytest

from fope_jax.spectrum.demo import demo
from tests.report.conftest import *  # noqa: F403


@pytest.fixture(scope="session")
def demo_numbers():
    return demo()
