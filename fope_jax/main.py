"""The command line: `fope data build|inspect` and `fope train|extend|evaluate|plan|report|...`."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
import traceback
from collections.abc import Sequence

from fope_jax.command_line.parser import build_parser, check_verb
from fope_jax.command_line.version import version_text
from fope_jax.extras import require
from fope_jax.logs import log_to_stderr, users_line
from fope_jax.processes.signals import (
    end_with_parent,
    exit_after_grace_period,
    is_distributed,
    raise_on_signal,
)
from fope_jax.storage.program_cache import keep_programs
from fope_jax.train.options import parse_arguments

CLOSED_PIPE = 128 + 13  # as of SIGPIPE: the reader, such as `head`, has had enough
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's message


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code, 1 for problems that `fope doctor` found."""
    parser, argv = build_parser(), sys.argv[1:] if argv is None else argv
    check_verb(parser, argv)
    arguments = parse_arguments(parser, argv)
    if arguments.version:
        print(version_text(with_devices=arguments.verbose))
        return 0
    if arguments.verb is None:
        parser.print_help()
        return 0
    try:
        with log_to_stderr(), exit_after_grace_period(), raise_on_signal():
            end_with_parent()
            keep_programs()
            for library in arguments.verb.needs:
                require(library, "train")
            for module in arguments.allow_module:
                from fope_jax.position.registry import import_module

                import_module(module)
            code = arguments.verb.run(arguments) or 0
            if sys.stdout is not None:  # as under a daemon
                sys.stdout.flush()  # a closed pipe is noticed here, not when Python ends
            return code
    except BrokenPipeError as error:
        if not _is_output_closed():
            raise
        return _end(error, CLOSED_PIPE)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted"
        print(f"fope: {reason}; the same command goes on from what has been saved", file=sys.stderr)
        return _end(stop, getattr(stop, "exit_code", 130))
    except Exception as error:
        if not _is_for_user(error):
            if is_distributed():
                traceback.print_exc()
                _end(error, 1)
            raise
        if arguments.traceback:
            traceback.print_exc()
        else:
            print(f"fope: {_message(error, arguments)}", file=sys.stderr)
        return _end(error, getattr(error, "exit_code", 2))


def _is_output_closed() -> bool:
    """Whether nobody reads stdout any more; then what is left of it goes nowhere."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_closed


def _end(error: BaseException, code: int) -> int:
    """The exit code. If other processes still wait for this one, exits without JAX's last barrier.

    They then miss its heartbeat (`HEARTBEAT_SECONDS`), and JAX ends them.
    """
    if is_distributed() and not getattr(error, "is_in_all_processes", False):
        import jax

        if jax.process_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _is_for_user(error: Exception) -> bool:
    """Whether a user can fix it; any other error is a bug and keeps its traceback."""
    ours = type(error).__module__.startswith(("fope_jax.", "gcsfs.", "aiohttp."))
    # The model or batch is too large, or a number exceeds a library's range.
    too_large = isinstance(error, (MemoryError, OverflowError)) or _OUT_OF_MEMORY in str(error)
    return ours or too_large or isinstance(error, (ValueError, OSError, ImportError))


def _message(error: Exception, arguments: argparse.Namespace) -> str:
    """The error's message; memory errors are shortened, and an empty one becomes its type.

    One out of a user's module, such as that of a method, also names the line.
    That of a missing token cache names the command that builds it.
    """
    from fope_jax.data.manifest import BUILD, MissingCacheError

    text = str(error)
    if isinstance(error, MissingCacheError) and getattr(arguments, "config", None):
        text = text.replace(BUILD, _build_command(arguments))
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY in text:
        needed = " ".join(text.split())[:200]
        return f"out of memory: the model, the batch or the length is too large here ({needed})"
    return (text or type(error).__name__) + users_line(error)


def _build_command(arguments: argparse.Namespace) -> str:
    """`fope data build` for the configuration of another verb."""
    prefix = "--config.data."
    overrides = [f"--{o.removeprefix('--')}" for o in arguments.overrides]
    data = [override for override in overrides if override.startswith(prefix)]
    return shlex.join(["fope", "data", "build", "--config", arguments.config, *data])


if __name__ == "__main__":
    sys.exit(main())
