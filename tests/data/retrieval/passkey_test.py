"""Passkey windows: exact lengths, whole sentences around the key, natural answers."""

import re

import numpy as np
import pytest

from fope_jax.data.retrieval.base import ITEM_SPLITS, NUM_DISTRACTORS, split_of
from fope_jax.data.retrieval.passkey import STANDARD, TEMPLATES, Passkey


def draws(count, seed=3):
    return [[seed, i] for i in range(count)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.97, 1])
def test_windows_have_the_exact_length_and_hold_their_parts(tokenizer, template, depth):
    task = Passkey.from_tokenizer(tokenizer, template)
    for seed in draws(4):
        pieces = task.draw_pieces(np.random.default_rng(seed), "test")
        assert task.min_length(np.random.default_rng(seed), "test") == pieces.fixed
        for context in (pieces.fixed, pieces.fixed + 1, 3 * pieces.fixed + 7):
            trial = task.draw_trial(np.random.default_rng(seed), context, depth, "test")
            text, (key,) = tokenizer.decode(trial.tokens), trial.answer_texts
            assert trial.tokens.shape == (context,)
            assert text.startswith(template.intro)
            assert text.endswith(template.question + f" {key}")
            room = context - pieces.fixed
            before = tokenizer.decode(trial.tokens[len(pieces.intro) :][: round(depth * room)])
            assert text[len(template.intro) + len(before) :].startswith(
                template.needle.format(key=key)
            )


def test_depth_places_the_needle_and_filler_beside_it_is_whole(pieces):
    task = Passkey.from_tokenizer(pieces(r"."), STANDARD)
    fixed = task.pieces_for_key(12345, []).fixed
    for depth in (0.25, 0.5, 0.75):
        trial = task.draw_trial(np.random.default_rng(1), 2_000, depth, "test")
        text, (key,) = task.tokenizer.decode(trial.tokens), trial.answer_texts
        start = text.index(f" The pass key is {key}")
        assert start - len(STANDARD.intro) == round(depth * (2_000 - fixed))
        assert text[:start].endswith("There and back again.")
        assert text[start + len(STANDARD.needle.format(key=key)) :].startswith(
            " The grass is green."
        )


def test_answers_are_the_natural_tokens_of_question_and_answer(tokenizer):
    task = Passkey.from_tokenizer(tokenizer, STANDARD)
    for key in range(12340, 12360):
        pieces = task.pieces_for_key(key, [54321])
        assert pieces.question + pieces.answer == tokenizer.encode(f"{STANDARD.question} {key}")
        straddles = tokenizer.pattern.pattern.startswith("is")
        first = "is" if straddles else ""  # the token that straddles the border is the answer's
        assert tokenizer.decode(pieces.answer) == f"{first} {key}"
        assert tokenizer.decode(pieces.distractors[0]) == f"{first} 54321"


@pytest.mark.parametrize("half", ITEM_SPLITS)
def test_keys_have_five_digits_and_belong_to_one_half(pieces, half):
    task = Passkey.from_tokenizer(pieces(r"."))
    keys = set()
    for seed in draws(300):
        trial = task.draw_trial(np.random.default_rng(seed), 100, 0.5, half)
        distractors = [
            task.tokenizer.decode(distractor).strip() for distractor in trial.distractors
        ]
        assert len({*trial.answer_texts, *distractors}) == 1 + NUM_DISTRACTORS
        keys |= {*trial.answer_texts, *distractors}
    assert len(keys) > 2_800
    assert all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys)
    assert {split_of(key.encode()) for key in keys} == {half}


class NoDigits:
    fingerprint = "no digits"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return re.sub(r"\d", "?", bytes(ids).decode())


def test_a_tokenizer_that_loses_digits_is_named():
    task = Passkey.from_tokenizer(NoDigits())
    with pytest.raises(ValueError, match=r"passkey .compact.: .* answer \d{5} as ' \?{5}'"):
        task.draw_trial(np.random.default_rng(0), 200, 0.5, "test")


def test_what_does_not_fit_is_named(pieces):
    task = Passkey.from_tokenizer(pieces(r"."), STANDARD)
    minimum = len(STANDARD.intro + STANDARD.needle.format(key=12345) + STANDARD.question) + 6
    with pytest.raises(ValueError, match=f"context of {minimum - 1} tokens; .* {minimum}"):
        task.draw_trial(np.random.default_rng(0), minimum - 1, 0.5, "test")
    assert len(task.draw_trial(np.random.default_rng(0), minimum, 0.5, "test").tokens) == minimum
    with pytest.raises(ValueError, match=r"depth is 1.5; accepted: 0 to 1"):
        task.draw_trial(np.random.default_rng(0), 900, 1.5, "test")
