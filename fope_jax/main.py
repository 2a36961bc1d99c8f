"""The command line: `fope data build|inspect` and `fope train|extend|evaluate|plan|report|...`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from fope_jax.command_line.parser import build_parser, parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code, see ``EXIT_CODES`` of the texts; 1 where `fope doctor`
    found any."""
    parser = build_parser()
    arguments = parse_arguments(parser, argv)
    try:
        with _messages():
            code = arguments.verb(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"fope: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return code or 0


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
