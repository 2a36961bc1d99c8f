"""What a user sees while something runs: log messages and progress bars."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar

_is_quiet = ContextVar("is_quiet", default=False)


def is_quiet() -> bool:
    """Whether progress bars and messages of progress are left out, see `quiet`."""
    return _is_quiet.get()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars in the block; messages of progress go to the logger ``fope_jax`` alone.

    >>> with quiet():
    ...     is_quiet()
    True
    >>> is_quiet()
    False
    """
    token = _is_quiet.set(True)
    try:
        with _hush_libraries():
            yield
    finally:
        _is_quiet.reset(token)


def report_progress(line: str, logger: logging.Logger) -> None:
    """Prints a line to stderr, or logs it in `quiet`."""
    if is_quiet():
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Prints our log messages to stderr in the block, without those of libraries."""
    ours = logging.getLogger("fope_jax")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # a root handler would print them twice
    try:
        with _hush_libraries():
            yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate = before


@contextlib.contextmanager
def _hush_libraries() -> Iterator[None]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl, buckets = logging.getLogger("absl"), logging.getLogger("gcsfs")
    before = absl.level, buckets.level
    absl.setLevel(logging.ERROR)
    buckets.setLevel(logging.CRITICAL)  # logs a traceback of errors that it also raises
    try:
        yield
    finally:
        absl.level, buckets.level = before


def users_line(error: BaseException) -> str:
    """`` (FILE, line N)`` of the user's own code that an error came from; "" if it has none."""
    library, package = os.path.dirname(os.__file__), os.path.dirname(__file__)
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        name = frame.f_code.co_filename
        if not name.startswith((library, package, "<")) and "site-packages" not in name:
            return f" ({name}, line {line})"
    return ""
