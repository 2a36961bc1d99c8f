"""Runs to extend: the same small ones that the tests of training use."""

from tests.train.conftest import *  # noqa: F403
