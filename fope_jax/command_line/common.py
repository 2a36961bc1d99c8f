"""What the verbs of `fope` share: how one is added, the start of its processes, its experiment.

Each verb imports what it needs when it runs: `fope report` starts without jax.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fope_jax.train.options import check_named


def add_verb(
    verbs: Any,
    run: Callable[[argparse.Namespace], int | None],
    description: str,
    epilog: str = "",
    needs: str = "ml_collections,flax",
) -> argparse.ArgumentParser:
    """Adds the verb of the name of ``run``, and returns its parser.

    Args:
      verbs: the subparsers.
      run: what it does; returns the exit code, None for 0.
      description: of a line.
      epilog: examples, shown under its options.
      needs: modules of the extra [train], by commas, without which it does not begin.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    options: Any = dict(description=description, epilog=epilog, formatter_class=formatter)
    name = run.__name__.strip("_")  # "import" is a word of Python
    verb = verbs.add_parser(name, help=description, allow_abbrev=False, **options)
    verb.set_defaults(verb=run, needs=split_commas(needs or None))
    verb.add_argument("--traceback", action="store_true", help="show where an error arose")
    return verb


def add_out(verb: argparse.ArgumentParser, description: str, required: bool = True) -> None:
    """``-o`` of verbs that write a page or files."""
    verb.add_argument("-o", "--out", type=local_path, required=required, help=description)


def add_step(verb: Any) -> None:
    """``--step`` of verbs that read one checkpoint."""
    verb.add_argument("--step", type=int, help="checkpoint; the newest without it")


def local_path(text: str) -> Path:
    """A path of this machine."""
    check_named(text)
    if "://" in text:  # a Path would make a directory "gs:" here
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a directory of this machine")
    return Path(text)


def split_commas(text: str | None) -> list[str]:
    """The parts of ``a,b``; none where nothing was given."""
    return [] if text is None else [part.strip() for part in text.split(",")]


def whole_numbers(option: str, text: str | None) -> list[int]:
    """The numbers of ``1,2``; the option is named in the error."""
    parts = split_commas(text)
    for part in parts:
        if not part.isdecimal():
            raise ValueError(f"{option} {text}: {part!r} is no whole number")
    return [int(part) for part in parts]


def load_experiment(arguments: argparse.Namespace):
    """The experiment of --config and its overrides."""
    from fope_jax.config import build_experiment, load_config

    return build_experiment(load_config(arguments.config, arguments.overrides))


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes of the run, where there are any."""
    from fope_jax.processes.collectives import is_main_process
    from fope_jax.processes.start import initialize

    initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        arguments.distributed_timeout,
    )
    if not is_main_process():  # one of them says what all do; warnings and errors come from each
        logging.getLogger("fope_jax").setLevel(logging.WARNING)


def print_once(line: str) -> None:
    """Prints what all processes would print."""
    from fope_jax.processes.collectives import is_main_process

    if is_main_process():
        print(line)
