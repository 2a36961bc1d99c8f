"""Small made-up runs, as the tests of the report use."""

from tests.report.conftest import *  # noqa: F403
