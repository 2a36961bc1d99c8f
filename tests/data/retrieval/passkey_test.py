"""Passkey windows: exact lengths, whole sentences around the key, natural answers."""

import re

import numpy as np
import pytest

from fope_jax.data.retrieval.base import HALVES, RIVALS, half_of
from fope_jax.data.retrieval.passkey import STANDARD, TEMPLATES, Passkey


def draws(count, seed=3):
    return [[seed, i] for i in range(count)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.97, 1])
def test_windows_have_the_exact_length_and_hold_their_parts(tokenizer, template, depth):
    task = Passkey.of(tokenizer, template)
    for seed in draws(4):
        parts = task.parts(np.random.default_rng(seed), "test")
        assert task.shortest(np.random.default_rng(seed), "test") == parts.fixed
        for context in (parts.fixed, parts.fixed + 1, 3 * parts.fixed + 7):
            trial = task.trial(np.random.default_rng(seed), context, depth, "test")
            text, (key,) = tokenizer.decode(trial.tokens), trial.parts
            assert trial.tokens.shape == (context,)
            assert text.startswith(template.intro)
            assert text.endswith(template.question + f" {key}")
            room = context - parts.fixed
            before = tokenizer.decode(trial.tokens[len(parts.intro) :][: round(depth * room)])
            assert text[len(template.intro) + len(before) :].startswith(
                template.needle.format(key=key)
            )


def test_depth_places_the_needle_and_filler_beside_it_is_whole(pieces):
    task = Passkey.of(pieces(r"."), STANDARD)
    fixed = task.parts_of(12345, []).fixed
    for depth in (0.25, 0.5, 0.75):
        trial = task.trial(np.random.default_rng(1), 2_000, depth, "test")
        text, (key,) = task.tokenizer.decode(trial.tokens), trial.parts
        start = text.index(f" The pass key is {key}")
        assert start - len(STANDARD.intro) == round(depth * (2_000 - fixed))
        assert text[:start].endswith("There and back again.")
        assert text[start + len(STANDARD.needle.format(key=key)) :].startswith(
            " The grass is green."
        )


def test_answers_are_the_natural_tokens_of_question_and_answer(tokenizer):
    task = Passkey.of(tokenizer, STANDARD)
    for key in range(12340, 12360):
        parts = task.parts_of(key, [54321])
        assert parts.question + parts.answer == tokenizer.encode(f"{STANDARD.question} {key}")
        straddles = tokenizer.pattern.pattern.startswith("is")
        first = "is" if straddles else ""  # the token that straddles the border is the answer's
        assert tokenizer.decode(parts.answer) == f"{first} {key}"
        assert tokenizer.decode(parts.rivals[0]) == f"{first} 54321"


@pytest.mark.parametrize("half", HALVES)
def test_keys_have_five_digits_and_belong_to_one_half(pieces, half):
    task = Passkey.of(pieces(r"."))
    keys = set()
    for seed in draws(300):
        trial = task.trial(np.random.default_rng(seed), 100, 0.5, half)
        rivals = [task.tokenizer.decode(rival).strip() for rival in trial.rivals]
        assert len({*trial.parts, *rivals}) == 1 + RIVALS
        keys |= {*trial.parts, *rivals}
    assert len(keys) > 2_800
    assert all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys)
    assert {half_of(key.encode()) for key in keys} == {half}


class NoDigits:
    fingerprint = "no digits"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return re.sub(r"\d", "?", bytes(ids).decode())


def test_a_tokenizer_that_loses_digits_is_named():
    task = Passkey.of(NoDigits())
    with pytest.raises(ValueError, match=r"template 'compact': .* answer \d{5} as ' \?{5}'"):
        task.trial(np.random.default_rng(0), 200, 0.5, "test")


def test_what_does_not_fit_is_named(pieces):
    task = Passkey.of(pieces(r"."), STANDARD)
    minimum = len(STANDARD.intro + STANDARD.needle.format(key=12345) + STANDARD.question) + 6
    with pytest.raises(ValueError, match=f"context of {minimum - 1} tokens; .* {minimum}"):
        task.trial(np.random.default_rng(0), minimum - 1, 0.5, "test")
    assert len(task.trial(np.random.default_rng(0), minimum, 0.5, "test").tokens) == minimum
    with pytest.raises(ValueError, match=r"depth is 1.5; accepted: 0 to 1"):
        task.trial(np.random.default_rng(0), 900, 1.5, "test")
