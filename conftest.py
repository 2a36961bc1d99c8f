"""Which files are read for doctests: only those that have one.

To look for doctests pytest imports a module in every worker. TensorFlow, which takes ten seconds to
import, is left to the tests that use it.
"""

import pytest
from _pytest.doctest import DoctestModule


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    found = yield
    if file_path.suffix != ".py":
        return found
    text = file_path.read_text()
    if ">>>" in text and "tf_libraries import" not in text:
        return found
    return [collector for collector in found if not isinstance(collector, DoctestModule)]
