"""The parser of `fope`, in the order of its help."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

from fope_jax.command_line import config, evaluate, extend, generate, plan, report, train, weights  # noqa: F401
from fope_jax.command_line.common import VERBS, Verb
from fope_jax.spelling import likely
from fope_jax.train.options import VerbParser

DESCRIPTION = """\
Train one transformer with any position embedding, and measure it beyond its training length.

  fope data build --config configs/quickstart.py
  fope train --config configs/quickstart.py:position=fope --workdir runs/fope
  fope evaluate runs/fope
  fope generate runs/fope "It was"    what it writes after a prompt
  fope spectrum runs/fope          which frequencies attention uses, inside and beyond training
  fope report runs/fope runs/rope -o runs/report
  fope extend runs/rope --method yarn --length 256 --workdir runs/rope_yarn

  fope import DIR --workdir runs/x    weights of Llama, Mistral, Qwen, OLMo, SmolLM; also of a .gguf
  fope export runs/fope -o DIR        and back

  fope plan --config configs/paper/c4_books.py --topology v5e:4x4 --method rope,fope

  fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
  fope doctor runs/fope            is a run sound, and what is to be done if not

  fope config --keys               every key of a configuration, its default and its meaning
  fope methods [NAME]              every position embedding, its knobs and its source
  fope gallery -o runs/gallery     a picture of each
"""


# In the order of the help.
_VERBS = ("train", "extend", "evaluate", "sweep", "spectrum", "plan", "import", "export", "report")
_VERBS += ("generate", "doctor", "config", "methods", "gallery")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``verb`` to its declaration and ``parser`` to its own."""
    parser = argparse.ArgumentParser(
        prog="fope",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(traceback=False, verb=None)
    parser.add_argument("--version", action="store_true", help="print versions")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="with --version: the devices of jax too"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=VerbParser)
    data = verbs.add_parser(
        "data", help="build or inspect the token cache, or fetch texts", allow_abbrev=False
    )
    data.example = "fope data build --config configs/quickstart.py"
    actions = data.add_subparsers(
        title="actions", required=True, metavar="ACTION", parser_class=VerbParser
    )
    actions_of_data = dict.fromkeys(("data build", "data inspect", "data download"), actions)
    parents = actions_of_data | dict.fromkeys(_VERBS, verbs)
    for name, parent in parents.items():
        _add_verb(parent, name, VERBS[name])
    return parser


def _add_verb(parent: argparse._SubParsersAction[VerbParser], name: str, verb: Verb) -> None:
    description, _, epilog = inspect.cleandoc(verb.run.__doc__ or "").partition("\n")
    added = parent.add_parser(
        name.split()[-1],
        help=description,
        description=description,
        epilog=epilog.strip() + "\n" if epilog else "",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    lines = map(str.strip, epilog.splitlines())
    added.example = next((line for line in lines if line.startswith("fope ")), f"fope {name}")
    added.set_defaults(verb=verb, parser=added)
    added.add_argument(
        "--allow-module",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this Python module, which a run names for its position embedding",
    )
    added.add_argument("--traceback", action="store_true", help="show where an error arose")
    for add in verb.options:
        add(added)


def check_verb(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Ends with the nearest verb where the first word is none."""
    word = next((word for word in argv if not word.startswith("-")), None)
    known = ("data", *_VERBS)
    if word is None or word in known:
        return
    longer = [verb for verb in known if verb.startswith(word)] if word else []
    near = longer[0] if len(longer) == 1 else likely(word, known)
    hint = f"; did you mean {near!r}?" if near else ""
    parser.error(f"{word!r} is no verb{hint} (verbs: {', '.join(known)})")
