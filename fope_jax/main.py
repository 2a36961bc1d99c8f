"""The command line: `fope data build|inspect` and `fope train|extend|evaluate|plan|report|...`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from fope_jax.command_line.parser import build_parser, parse_arguments
from fope_jax.signals import end_with_parent, ended_in_time, has_joined, raising


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code, see ``EXIT_CODES`` of the texts; 1 where `fope doctor`
    found any."""
    parser = build_parser()
    arguments = parse_arguments(parser, argv)
    try:
        with _messages(), ended_in_time(), raising():
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
            print(f"fope: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
        _tell_others(error, str(error), code)
        return code
    return code or 0


def _tell_others(
    error: BaseException, reason: str, code: int, report: Callable[[], None] = lambda: None
) -> None:
    """Ends the other processes of the run too, where ``error`` is of this one alone."""
    if has_joined() and not getattr(error, "in_all_processes", False):
        from fope_jax.processes import tell_end

        tell_end(reason, code, report)


def _is_users(error: Exception) -> bool:
    """Whether a user can put it right; any other is a defect of ours and keeps its traceback."""
    ours = type(error).__module__.startswith(("fope_jax.", "gcsfs.", "aiohttp."))
    return ours or isinstance(error, (ValueError, OSError, ImportError))


@contextlib.contextmanager
def _messages():
    """Our own messages on stderr while a verb runs, without those of the libraries below us."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    ours, absl = logging.getLogger("fope_jax"), logging.getLogger("absl")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = ours.level, ours.propagate, absl.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # another library's handler at the root would print them again
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate, absl.level = before


if __name__ == "__main__":
    sys.exit(main())
