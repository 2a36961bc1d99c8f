"""Reference pages that are read off the program: its verbs and the keys of a configuration."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from fope_jax.command_line.parser import build_parser
from fope_jax.config.keys import all_keys, keys_markdown

CONFIGURATION = """\
# Configuration

Every key of a configuration. A file sets it (`config.train.steps = 500`), a command line overrides
it (`--config.train.steps=500`), and `fope config --keys` prints this list in the terminal. The
knobs of a position embedding are on its page under [Methods](../methods/index.md), and
`fope config --keys position.fope` prints them.
"""
COMMAND_LINE = """\
# Command line

What `fope VERB --help` prints.
"""


def pages() -> dict[str, str]:
    return {"reference/cli.md": command_line(), "reference/configuration.md": configuration()}


def configuration() -> str:
    """A table for each section, in the order of the dataclasses."""
    sections: dict[str, list] = {}
    for key in all_keys():
        section = key.name.partition(".")[0] if "." in key.name else "top level"
        sections.setdefault(section, []).append(key)
    parts = [CONFIGURATION]
    for section, keys in sections.items():
        parts.append(f"## {section}\n\n{keys_markdown(keys)}\n")
    return "\n".join(parts)


def command_line() -> str:
    os.environ["COLUMNS"] = "96"  # where argparse breaks lines
    parts = [COMMAND_LINE]
    for name, parser in verbs(build_parser()):
        parts.append(f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def verbs(
    parser: argparse.ArgumentParser, name: str = "fope"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its verbs, each with its command."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from verbs(inner, f"{name} {verb}")
