import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_fast(compile_fast):
    """For every module of this folder."""
