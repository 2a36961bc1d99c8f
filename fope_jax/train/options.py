"""The options of `fope train` and `fope extend`, for the command line and for sweeps."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fope_jax.storage.paths import as_path

OVERRIDE = "--config."
_OPTION = re.compile(r"-(?![\d.])")  # not a negative number
_CONFIG_FILE = re.compile(r"[^-].*\.(py|json)(:|$)")


class VerbParser(argparse.ArgumentParser):
    """A parser that shows an example where an argument is missing.

    A positional argument may be given by the option that it once was:

    >>> parser = VerbParser()
    >>> add_positional(parser, "run", former_option="--run")
    >>> parser.parse_args(["--run", "runs/a"]) == parser.parse_args(["runs/a"])
    True
    """

    example = ""
    former_option: str | None = None

    def error(self, message: str) -> NoReturn:
        is_missing = "required" in message or "missing" in message
        super().error(f"{message}\nexample: {self.example}" if is_missing else message)

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
        if self.former_option and args is not None:
            prefix = f"{self.former_option}="
            args = [arg.removeprefix(prefix) for arg in args if arg != self.former_option]
        return super().parse_known_args(args, namespace)


def add_positional(
    parser: argparse.ArgumentParser, name: str, former_option: str, **settings: Any
) -> None:
    """A positional argument; a `VerbParser` takes it as ``former_option`` too."""
    parser.add_argument(name, **settings)
    if isinstance(parser, VerbParser):
        parser.former_option = former_option


def add_train_options(verb: argparse.ArgumentParser) -> None:
    """The options of `fope train`, for `check_train_options`, without those of processes."""
    add_config(verb, is_required=False)
    verb.add_argument(
        "--continue-for",
        type=_count,
        metavar="STEPS",
        help="in place of --config: train the finished run in --workdir for so many steps more",
    )
    _add_workdir(verb, is_required=False)
    add_accept_position(verb)


def check_train_options(arguments: argparse.Namespace) -> None:
    """Ends with what is missing: one of --config and --continue-for, and --workdir."""
    has_config, has_more = arguments.config is not None, arguments.continue_for is not None
    missing = [] if has_config or has_more else ["--config"]
    missing += ["--workdir"] if arguments.workdir is None else []
    if missing:
        arguments.parser.error(f"the following arguments are required: {', '.join(missing)}")
    if has_config and has_more:
        arguments.parser.error("--continue-for takes the configuration of the run, not --config")


def add_extend_options(verb: argparse.ArgumentParser) -> None:
    """The options of `fope extend`, except those for several processes."""
    add_positional(
        verb,
        "parent",
        former_option="--from",
        type=run_or_weights,
        metavar="RUN[/STEP]|hf:ORG/NAME[@REVISION]|hf:DIR",
        help="the run to go on from, its newest checkpoint without a step; or a "
        "Hugging Face checkpoint, by its name or its directory",
    )
    verb.add_argument(
        "--method", required=True, help="the position embedding to go on with, also MODULE:CLASS"
    )
    verb.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    _add_workdir(verb)
    verb.add_argument(
        "--no-train",
        action="store_true",
        help="only change the positions: a run with the parent's weights, which lie on disk once; "
        "its length may be shorter than the parent's",
    )
    verb.add_argument(
        "--allow-shorter",
        action="store_true",
        help="take a length below the parent's, or another position embedding at its own; "
        "--no-train takes both without",
    )
    verb.add_argument(
        "--optimizer",
        choices=("keep", "reset-moments", "reset"),
        default="reset-moments",
        help="keep moments and schedule, or begin both anew (the default; with AdamW both resets "
        "are the same)",
    )
    verb.add_argument(
        "--match",
        choices=("frequency", "index"),
        default="frequency",
        help="how FoPE's coefficients find their place among more frequencies",
    )
    verb.add_argument(
        "--warn-above",
        type=_ratio,
        default=1.2,
        metavar="RATIO",
        help="warn where the first loss is more than so many times the parent's (1.2)",
    )
    verb.add_argument(
        "--no-evaluate",
        action="store_true",
        help="leave out the whole evaluation at the end, `fope evaluate`",
    )
    verb.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="a configuration of the new run; without it its values follow from the parent's. "
        "--config.SECTION.KEY=VALUE changes one",
    )
    add_accept_position(verb)


def _add_workdir(verb: argparse.ArgumentParser, is_required: bool = True) -> None:
    verb.add_argument(
        "--workdir",
        type=directory,
        required=is_required,
        metavar="DIR",
        help="directory of this run, also in a bucket: gs://BUCKET/PATH",
    )


def add_config(verb: argparse.ArgumentParser, is_required: bool = True) -> None:
    verb.add_argument(
        "--config",
        required=is_required,
        metavar="FILE[:ARG]",
        help="configuration file and its argument; --config.SECTION.KEY=VALUE changes a value",
    )


def add_accept_position(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--accept-position",
        metavar="HASH",
        help="take weights of another position embedding; the error message tells the hash",
    )


def add_processes(verb: argparse.ArgumentParser) -> None:
    """Adds the options by which several processes find each other."""
    group = verb.add_argument_group(
        "several processes", "found by itself on a TPU slice; tpu_scripts/local.sh sets all of it"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (FOPE_COORDINATOR)")
    group.add_argument("--num-processes", type=int, help="number of processes (FOPE_NUM_PROCESSES)")
    group.add_argument(
        "--process-id", type=int, help="number of this one, from 0 (FOPE_PROCESS_ID)"
    )
    group.add_argument(
        "--distributed-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait for the others (FOPE_DISTRIBUTED_TIMEOUT)",
    )


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parses a command; its overrides are taken out first and become ``overrides``, in order."""
    try:
        words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        parser.error(str(error))
    arguments, strangers = parser.parse_known_args(words)
    if strangers or (overrides and not hasattr(arguments, "config")):
        stranger = (strangers or overrides)[0]
        advice = "a configuration value is given as --config.train.steps=100"
        if hasattr(arguments, "config") and _CONFIG_FILE.match(stranger):
            advice = f"a configuration is given as --config {stranger}"
        elif not stranger.startswith("-"):
            advice = (
                "one more than the verb takes; several values of an option are joined by commas"
            )
        getattr(arguments, "parser", parser).error(f"unknown argument {stranger!r} ({advice})")
    arguments.overrides = overrides
    return arguments


def split_overrides(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """The other arguments, and the overrides, all in the form with "=".

    argparse would take a value after a space for a positional argument, and so an override that
    contains a space.

    >>> split_overrides(["RUN", "--config.train.steps", "3", "--config.seed=1"])
    (['RUN'], ['--config.train.steps=3', '--config.seed=1'])
    """
    words, rest, overrides = iter(argv), [], []
    for word in words:
        if not word.startswith(OVERRIDE):
            rest.append(word)
            continue
        if "=" not in word:
            value = next(words, None)
            if value is None or _OPTION.match(value):
                raise ValueError(f"{word} has no value; accepted: {word}=VALUE or {word} VALUE")
            word += f"={value}"
        overrides.append(word)
    return rest, overrides


def directory(text: str) -> Path:
    """The path of a directory on this machine or in a bucket."""
    check_named(text)
    try:
        return as_path(text)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_or_weights(text: str) -> str | Path:
    """A run's directory, or the name of Hugging Face weights, which begins with ``hf:``."""
    return text if text.startswith("hf:") else directory(text)


def _count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: an integer of 1 or more")
    return int(text)


def _ratio(text: str) -> float:
    """A number above 0; NaN is rejected, since comparing with it would never warn."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number above 0")
    return value


def check_named(text: str) -> None:
    """Raises ArgumentTypeError if ``text`` cannot name a file or directory."""
    if not text.strip():  # an empty shell variable: pathlib would use the current directory
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a path")
    try:
        text.encode()
    except UnicodeEncodeError:  # Orbax and protocol buffers fail on other text
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a path in UTF-8") from None
