"""Passkey retrieval: a five-digit key hidden in filler, asked for at the end of the window.

A trial is a window of an exact number of tokens,

    intro + filler * a + needle + filler * b + question + answer,

with the needle at a given depth (0: right after the intro, 1: right before the question). The
filler before the needle loses tokens from its beginning and the filler after it from its end, so
the needle stands between whole sentences and the total, answer included, is exactly the context.

**Scoring.** A trial is right when greedy decoding from the question writes the answer. Greedy
decoding follows the answer's tokens exactly as long as each most likely next token is the
answer's, hence it writes the whole answer if and only if, with the answer fed in (teacher
forcing), the most likely token is right at every answer position. One forward pass thus decides a
trial. What the model would write after the last digit is not looked at.

**Keys.** The script that made this test common draws ``randint(1, 50000)``; here every key has
five digits, so that no trial is easier than another. The same keys are used at every length and
for every variant and template: only length and place differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fope_jax.evaluate.perplexity import Progress, plain
from fope_jax.evaluate.scoring import Scorer, score_windows


@dataclass(frozen=True)
class Template:
    """The texts of a passkey trial; ``{key}`` stands for the key.

    Attributes:
      name: what rows and reports call it.
      intro: text at the beginning of the window.
      filler: repeated to the length; begins with a space, so that repeats join to plain text.
      needle: the sentence to be found.
      question: the end of the prompt.
      answer: what the model must write after it.
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

Parts are joined by spaces where that script has line breaks: a tokenizer trained on books may
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


def draw_keys(depths: int, trials: int, seed: int) -> np.ndarray:
    """Five-digit keys ``[depths, trials]``, the same for every length, template and variant."""
    return np.random.default_rng(seed).integers(10_000, 100_000, size=(depths, trials))


@dataclass(frozen=True)
class TrialTokens:
    """The tokens of one trial's parts; ``answer`` is what is scored."""

    intro: list[int]
    filler: list[int]
    needle: list[int]
    question: list[int]
    answer: list[int]

    @property
    def fixed(self) -> int:
        """Tokens without any filler: the shortest window of this trial."""
        return len(self.intro) + len(self.needle) + len(self.question) + len(self.answer)


def tokenize_trial(template: Template, tokenizer: Any, key: int) -> TrialTokens:
    """Tokenizes the parts of one trial.

    Question and answer are encoded as one text, because that is what a model that writes the
    answer in its usual tokens would produce; the answer's tokens are those after the tokens shared
    with the question alone. With most tokenizers this is ``encode(question) + encode(answer)``;
    where a token straddles the border, it counts as part of the answer.

    Raises:
      ValueError: the tokenizer cannot write the key, so no model could be right.
    """
    question = list(tokenizer.encode(template.question))
    joint = list(tokenizer.encode(template.question + template.answer.format(key=key)))
    shared = 0
    while shared < min(len(question), len(joint)) and question[shared] == joint[shared]:
        shared += 1
    written = tokenizer.decode(joint[shared:])
    if str(key) not in written:
        raise ValueError(
            f"passkey template {template.name!r}: the tokenizer writes the key {key} as "
            f"{written!r}; it must keep digits"
        )
    return TrialTokens(
        intro=list(tokenizer.encode(template.intro)) if template.intro else [],
        filler=list(tokenizer.encode(template.filler)),
        needle=list(tokenizer.encode(template.needle.format(key=key))),
        question=joint[:shared],
        answer=joint[shared:],
    )


def minimum_context(template: Template, tokenizer: Any, keys: np.ndarray) -> int:
    """The shortest context in tokens that holds every trial of ``keys`` without filler."""
    return max(tokenize_trial(template, tokenizer, int(key)).fixed for key in keys.flat)


def build_window(trial: TrialTokens, context: int, depth: float) -> np.ndarray:
    """The window of one trial: exactly ``context`` tokens, the answer last.

    Args:
      trial: the tokenized parts.
      context: tokens of the window, answer included.
      depth: share of the filler that comes before the needle, 0 to 1.

    Raises:
      ValueError: the parts do not fit into ``context``, or the depth is outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"passkey depth is {depth}; accepted: 0 to 1")
    room = context - trial.fixed
    if room < 0:
        raise ValueError(
            f"a passkey trial does not fit into a context of {context} tokens; the shortest that "
            f"holds it has {trial.fixed}"
        )
    before = round(depth * room)
    repeats = room // len(trial.filler) + 1
    stretch = trial.filler * repeats
    # Cut at the ends far from the needle: [len - before:] rather than [-before:], which keeps
    # everything where before is 0.
    leading, trailing = stretch[len(stretch) - before :], stretch[: room - before]
    window = [*trial.intro, *leading, *trial.needle, *trailing, *trial.question, *trial.answer]
    return np.asarray(window, np.int32)


def score_passkey(
    scorer: Scorer,
    tokenizer: Any,
    template: Template,
    *,
    contexts: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
    batch_tokens: int,
    progress: Progress = plain,
) -> list[dict[str, Any]]:
    """Runs ``trials`` trials at each length and depth.

    Args:
      scorer: the model.
      tokenizer: ``encode`` and ``decode``.
      template: the texts.
      contexts: tokens of a window, answer included.
      depths: places of the needle, 0 to 1.
      trials: trials at each length and depth.
      seed: of the keys.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.

    Returns:
      One row for each context and depth: ``template, context, depth, correct, total, nats,
      tokens``; nats and tokens are sums over answer tokens.

    Raises:
      ValueError: a context is shorter than the template, with the shortest that fits.
    """
    if trials < 1:
        raise ValueError(f"passkey_trials is {trials}; accepted: 1 or more")
    keys = draw_keys(len(depths), trials, seed)
    check_contexts(template, tokenizer, contexts, keys)
    parts = [tokenize_trial(template, tokenizer, int(key)) for key in keys.flat]
    answer_tokens = np.array([len(part.answer) for part in parts])
    scored = int(answer_tokens.max())
    # The answer is the end of the window, and answers may differ in length.
    is_answer = np.arange(scored) >= scored - answer_tokens[:, None]
    rows = []
    for context in sorted(contexts):
        # The last answer token is only a target, so the model reads context - 1 tokens.
        nats, hits = score_windows(
            scorer,
            lambda i, context=context: build_window(parts[i], context, depths[i // trials]),
            len(parts),
            context=context - 1,
            scored=scored,
            batch_tokens=batch_tokens,
            progress=lambda batches, context=context: progress(
                batches, desc=f"passkey {template.name}, context {context}"
            ),
        )
        right = (hits | ~is_answer).all(axis=1).reshape(len(depths), trials)
        trial_nats = np.where(is_answer, nats, 0).sum(axis=1, dtype=np.float64)
        for index, depth in enumerate(depths):
            own = slice(index * trials, (index + 1) * trials)
            rows.append(
                {
                    "template": template.name,
                    "context": int(context),
                    "depth": float(depth),
                    "correct": int(right[index].sum()),
                    "total": trials,
                    "nats": float(trial_nats[own].sum()),
                    "tokens": int(answer_tokens[own].sum()),
                }
            )
    return rows


def check_contexts(
    template: Template, tokenizer: Any, contexts: Sequence[int], keys: np.ndarray
) -> None:
    """Raises ValueError, naming the shortest length that fits, where a context is too short."""
    minimum = minimum_context(template, tokenizer, keys)
    if min(contexts) < minimum:
        raise ValueError(
            f"passkey_lengths gives a context of {min(contexts)} tokens, too short for template "
            f"{template.name!r}, which takes at least {minimum} with this tokenizer; evaluate "
            "longer contexts or leave the template out of passkey_templates"
        )
