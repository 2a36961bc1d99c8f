"""`fope import` and `export`: weights of Hugging Face, and back."""

from __future__ import annotations

import argparse
from typing import Any

from fope_jax.command_line.common import add_out, add_step, add_verb, local_path
from fope_jax.train.options import add_accept_position, directory

IMPORT_EXAMPLES = """\
examples:
  fope import --from models/SmolLM2-135M --workdir runs/smollm2 --config.train.length=2048
  fope data build --config runs/smollm2/config.json
  fope evaluate --run runs/smollm2

train.length is the length that evaluation counts in multiples of; without it the checkpoint's
max_position_embeddings. Any value but the model's own can be given as --config.SECTION.KEY=VALUE.
"""


def add_import(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        import_,
        "make a run of a Hugging Face checkpoint",
        IMPORT_EXAMPLES,
        "ml_collections,flax",
    )
    add = verb.add_argument
    verb.set_defaults(config=None)  # its values can be changed as those of a file
    add(
        "--from",
        type=local_path,
        required=True,
        metavar="DIR",
        dest="source",
        help="directory with config.json and *.safetensors",
    )
    add("--workdir", type=directory, required=True, help="directory of the run")


def import_(arguments: argparse.Namespace) -> None:
    from fope_jax.interop.runs import import_run

    print(import_run(arguments.source, arguments.workdir, arguments.overrides))
    print(f"run in {arguments.workdir}")


def add_export(verbs: Any) -> None:
    verb = add_verb(verbs, export, "write a run as a Hugging Face checkpoint")
    add = verb.add_argument
    add("--run", type=directory, required=True, metavar="RUN[/STEP]", help="a --workdir")
    add_step(verb)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors; that of the import or of the parameters without it",
    )
    add_out(verb, "directory that is made")
    add_accept_position(verb)


def export(arguments: argparse.Namespace) -> None:
    from fope_jax.interop.runs import export_run

    accept = arguments.accept_position
    print(export_run(arguments.run, arguments.out, arguments.step, arguments.dtype, accept))
    print(f"checkpoint in {arguments.out}")
