"""`fope generate`: the text or tokens that a model writes after a prompt."""

from __future__ import annotations

import argparse

from fope_jax.command_line.common import option, verb
from fope_jax.train.options import run_or_weights


@verb(
    option(
        "run",
        type=run_or_weights,
        metavar="RUN[/STEP]",
        help="directory of a run, its --workdir; or hf:DIR or hf:ORG/NAME",
    ),
    option("prompt", metavar="PROMPT", help="a text, or token ids with --tokens"),
    option("--max-new-tokens", type=int, default=32, metavar="N", help="most tokens to write (32)"),
    option(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the most likely token, 1 draws from the model's distribution (0)",
    ),
    option("--seed", type=int, default=0, help="seed of the draws (0)"),
    option("--tokens", action="store_true", help="prompt and continuation are token ids"),
)
def generate(arguments: argparse.Namespace) -> None:
    """continue a prompt

    examples:
      fope generate runs/fope "Once upon a time"
      fope generate runs/fope/500 "It was" --max-new-tokens 100 --temperature 0.8 --seed 1
      fope generate runs/recall "17,42,5,17" --tokens --max-new-tokens 1
      fope generate hf:HuggingFaceTB/SmolLM2-135M "Once upon a time"

    A text is printed with its prompt, ids without. The end-of-document token ends it.
    """
    from fope_jax.api import load

    prompt = _token_ids(arguments.prompt) if arguments.tokens else arguments.prompt
    run = load(arguments.run)
    settings = arguments.max_new_tokens, arguments.temperature, arguments.seed
    written = run.generate(prompt, *settings)
    print(prompt + written if isinstance(written, str) else " ".join(map(str, written)))


def _token_ids(text: str) -> list[int]:
    """The ids of ``17,42`` or ``17 42``."""
    parts = text.replace(",", " ").split()
    for part in parts:
        if not part.isdecimal():
            raise ValueError(f"--tokens {text!r}: {part!r} is no token id")
    return [int(part) for part in parts]
