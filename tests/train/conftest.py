import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_once(compile_once):
    """For every module of this folder."""
