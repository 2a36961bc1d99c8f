"""`fope config`: what a configuration comes to, and every key that it may have."""

from __future__ import annotations

import argparse
import json

from fope_jax.command_line.common import load_experiment, option, verb


@verb(
    option("--config", metavar="FILE[:ARG]", help="print this configuration with all its values"),
    option("--json", action="store_true", help="as a config.json, which --config takes too"),
    option(
        "--keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="print the keys that there are: all, of a section, or of a method (position.fope)",
    ),
    option("--markdown", action="store_true", help="the keys as a table"),
)
def config(arguments: argparse.Namespace) -> None:
    """print a configuration with all its values, or every key there is

    examples:
      fope config --config configs/quickstart.py:position=rope --config.train.steps=100
      fope config --keys train
      fope config --keys train.schedule
      fope config --keys position.fope
      fope config --keys --markdown
    """
    if arguments.config is None and arguments.keys is None:
        arguments.parser.error("one of --config and --keys is required")
    if arguments.config is not None and arguments.keys is not None:
        arguments.parser.error("--keys lists the keys of every configuration; leave --config out")
    if arguments.config is None and arguments.overrides:
        arguments.parser.error(f"{arguments.overrides[0]} changes a value of --config FILE")
    from fope_jax.config import experiment_to_dict, flat_values
    from fope_jax.config.keys import find_keys, keys_markdown, keys_text

    if arguments.keys is not None:
        print((keys_markdown if arguments.markdown else keys_text)(find_keys(arguments.keys)))
        return
    experiment = load_experiment(arguments)
    if arguments.json:
        print(json.dumps(experiment_to_dict(experiment), indent=2))
        return
    for key, value in flat_values(experiment).items():
        print(f"{key} = {json.dumps(value)}")
