"""How a verb of `fope` is declared, and what the verbs share.

Each verb imports what it needs when it runs: `fope report` starts without jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.storage import paths
from fope_jax.storage.paths import check_bucket
from fope_jax.storage.run_paths import split_step
from fope_jax.train.options import add_positional, check_named, directory

Option = Callable[[Any], Any]  # adds something to a parser


class Verb(NamedTuple):
    """``run`` does it and returns the exit code, None for 0. ``needs`` are modules of the extra
    [train] without which it does not begin."""

    run: Callable[[argparse.Namespace], int | None]
    options: tuple[Option, ...]
    needs: tuple[str, ...]


VERBS: dict[str, Verb] = {}


def verb(*options: Option, name: str = "", needs: tuple[str, ...] = ("ml_collections", "flax")):
    """Declares the verb that a function runs.

    The first line of its docstring is the verb's description, the rest stands under its options.
    """

    def declare(run: Callable[[argparse.Namespace], int | None]):
        VERBS[name or run.__name__] = Verb(run, options, needs)
        return run

    return declare


def option(*names: str, **settings: Any) -> Option:
    """One argument, as `argparse.ArgumentParser.add_argument` takes it."""
    return lambda parser: parser.add_argument(*names, **settings)


def group(title: str, *options: Option) -> Option:
    """Options under a title of their own; without a title, of which at most one is given."""

    def add_all(parser: Any) -> None:
        parent = (
            parser.add_argument_group(title) if title else parser.add_mutually_exclusive_group()
        )
        for add in options:
            add(parent)

    return add_all


def local_path(text: str) -> Path:
    """The argument's path of this machine."""
    check_named(text)
    try:
        return paths.local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


RUNS_HELP = "directory of a run, its --workdir; RUN/STEP is one of its checkpoints (the newest)"
STEP = option("--step", type=int, help="step of the checkpoint, as in RUN/STEP")


def run_argument(**settings: Any) -> Option:
    """RUN[/STEP], for `run_and_step`."""
    shared = {"type": directory, "metavar": "RUN[/STEP]", "help": RUNS_HELP}
    return lambda parser: add_positional(parser, "run", "--run", **shared, **settings)


def run_and_step(arguments: argparse.Namespace) -> tuple[Path, int | None]:
    """What RUN[/STEP] and --step name; ValueError if they name two steps.

    A bucket is checked first, so that no error of its libraries comes through.
    """
    check_bucket(arguments.run)
    return split_step(arguments.run, arguments.step)


def out(description: str, required: bool = True) -> Option:
    """``-o`` of verbs that write a page or files."""
    return option("-o", "--out", type=local_path, required=required, help=description)


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


def load_with_tokenizer(arguments: argparse.Namespace):
    """The experiment of --config, with the tokenizer beside a config.json if its file is gone."""
    from fope_jax.data.config import with_tokenizer_beside

    experiment, path = load_experiment(arguments), Path(arguments.config)
    if path.suffix != ".json":
        return experiment
    data = with_tokenizer_beside(experiment.data, path.parent)
    return dataclasses.replace(experiment, data=data)


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
    if not is_main_process():  # otherwise every process repeats the same lines
        logging.getLogger("fope_jax").setLevel(logging.WARNING)


def print_once(line: str) -> None:
    """Prints what all processes would print."""
    from fope_jax.processes.collectives import is_main_process

    if is_main_process():
        print(line)
