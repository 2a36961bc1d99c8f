"""Passkey retrieval: a five-digit key in filler, asked for at the end of the window."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from fope_jax.data.retrieval.base import NUM_DISTRACTORS
from fope_jax.data.retrieval.text_task import NoiseHaystack, Pieces, TextTask, draw_numbers


@dataclass(frozen=True)
class Template:
    """The texts of a passkey trial, in the order of the window; ``{key}`` stands for the key.

    ``filler`` is repeated to the length; it begins with a space, so repeats join to plain text.
    """

    name: str
    intro: str
    filler: str
    needle: str
    question: str
    answer: str = " {key}"


STANDARD = Template(
    name="standard",
    intro=(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there."
    ),
    filler=(
        " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    ),
    needle=" The pass key is {key}. Remember it. {key} is the pass key.",
    question=" What is the pass key? The pass key is",
)
"""The template of Mohtashami and Jaggi 2023 (arXiv:2305.16300), as the YaRN evaluation words it.

Pieces are joined by spaces where that script has line breaks: a tokenizer trained on books may
have no token for a break.
"""

COMPACT = Template(
    name="compact",
    intro="",
    filler=" The sky is blue. The grass is green.",
    needle=" The key is {key}.",
    question=" The key is",
)
"""A short form for small models: nothing to understand, the question repeats the needle's words."""

TEMPLATES = {template.name: template for template in (COMPACT, STANDARD)}


@dataclass(frozen=True, eq=False)
class Passkey(TextTask):
    """A key in filler: ``intro + filler * a + needle + filler * b + question + answer``.

    The first filler is cut at its beginning and the second at its end, so the needle stands between
    whole sentences. Distractors are other keys of the same split.
    """

    template: Template = COMPACT

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, template: Template = COMPACT) -> Passkey:
        return cls(tokenizer, NoiseHaystack.from_tokenizer(tokenizer, template.filler), template)

    @property
    def name(self) -> str:
        return f"passkey ({self.template.name})"

    def draw_pieces(self, rng: np.random.Generator, split: str) -> Pieces:
        key, *others = draw_numbers(rng, 1 + NUM_DISTRACTORS, split)
        return self.pieces_for_key(key, others)

    def pieces_for_key(self, key: int, others: list[int]) -> Pieces:
        """The pieces of a trial with this key and these distractors."""
        template = self.template
        return self.encode_pieces(
            needles=[template.needle.format(key=key)],
            depths=[None],
            question=template.question,
            answer=template.answer.format(key=key),
            distractors=[template.answer.format(key=other) for other in others],
            answer_texts=[str(key)],
            intro=template.intro,
        )

    def describe(self) -> dict[str, Any]:
        stated = super().describe() | {"texts": dataclasses.asdict(self.template)}
        return {key: stated[key] for key in stated if key not in ("haystack", "filler")}
