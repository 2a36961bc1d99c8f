"""The command line: `fope data build|inspect` and `fope train|extend|evaluate|plan|report|...`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from fope_jax.command_line.parser import build_parser, parse_arguments
from fope_jax.processes.signals import (
    end_with_parent,
    exit_after_grace_period,
    is_distributed,
    raise_on_signal,
)

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in what XLA raises


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code, see ``EXIT_CODES`` of the texts; 1 where `fope doctor`
    found any."""
    parser = build_parser()
    arguments = parse_arguments(parser, argv)
    try:
        with _messages(), exit_after_grace_period(), raise_on_signal():
            end_with_parent()
            code = arguments.verb(arguments)
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
        reason = str(stop) or "interrupted"
        print(f"fope: {reason}; the same command goes on from what has been saved", file=sys.stderr)
        _tell_others(stop, reason, code)
        return code
    except Exception as error:
        if not _is_users(error):
            _tell_others(error, f"{type(error).__name__}: {error}", 1, traceback.print_exc)
            raise
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"fope: {_told(error)}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
        _tell_others(error, _told(error), code)
        return code
    return code or 0


def _tell_others(
    error: BaseException, reason: str, code: int, report: Callable[[], None] = lambda: None
) -> None:
    """Ends the other processes of the run too, where ``error`` is of this one alone."""
    if is_distributed() and not getattr(error, "is_in_all_processes", False):
        from fope_jax.processes.ending import announce_failure

        announce_failure(reason, code, report)


def _is_users(error: Exception) -> bool:
    """Whether a user can put it right; any other is a defect of ours and keeps its traceback."""
    kind = type(error)
    ours = kind.__module__.startswith(("fope_jax.", "gcsfs.", "aiohttp."))
    # A model or batch that is too large, or a number beyond what a library takes.
    too_large = isinstance(error, (MemoryError, OverflowError)) or _OUT_OF_MEMORY in str(error)
    return ours or too_large or isinstance(error, (ValueError, OSError, ImportError))


def _told(error: Exception) -> str:
    """The message of an error; libraries tell of memory in pages, or by a bare name."""
    text = str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY in text:
        needed = " ".join(text.split())[:200]
        return f"out of memory: the model, the batch or the length is too large here ({needed})"
    return text or type(error).__name__


@contextlib.contextmanager
def _messages():
    """Our own messages on stderr while a verb runs, without those of the libraries below us."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    ours, absl = logging.getLogger("fope_jax"), logging.getLogger("absl")
    buckets = logging.getLogger("gcsfs")  # prints a traceback for what it also raises
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = ours.level, ours.propagate, absl.level, buckets.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # another library's handler at the root would print them again
    absl.setLevel(logging.ERROR)
    buckets.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate, absl.level, buckets.level = before


if __name__ == "__main__":
    sys.exit(main())
