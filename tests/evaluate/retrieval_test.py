"""Passkey retrieval: exact windows, exact scores, and teacher forcing against greedy decoding."""

import re

import numpy as np
import pytest

from fope_jax.evaluate.retrieval import (
    COMPACT,
    STANDARD,
    TEMPLATES,
    build_window,
    draw_keys,
    minimum_context,
    score_passkey,
    tokenize_trial,
)


class Pieces:
    """A tokenizer that cuts text by a pattern and numbers the pieces as they come."""

    def __init__(self, pattern):
        self.pattern, self.ids, self.pieces = re.compile(pattern, re.DOTALL), {}, []

    def encode(self, text):
        found = self.pattern.findall(text)
        assert "".join(found) == text
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids):
        return "".join(self.pieces[int(i)] for i in ids)


TOKENIZERS = {
    "characters": r".",
    "words": r" ?[^ ]+",
    "digits apart": r" ?[a-zA-Z]+| |\d|[^a-zA-Z\d ]",
    "odd digit groups": r" ?[1-4]{1,3}| ?[5-9]{1,2}| ?[a-zA-Z]+|.",
    "straddling": r"is \d|.",
}


@pytest.fixture(params=TOKENIZERS, ids=lambda name: name.replace(" ", "-"))
def tokenizer(request):
    return Pieces(TOKENIZERS[request.param])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.97, 1])
def test_windows_have_the_exact_length_and_hold_their_parts(tokenizer, template, depth):
    keys = draw_keys(2, 5, seed=3)
    minimum = minimum_context(template, tokenizer, keys)
    for key in keys.flat:
        trial = tokenize_trial(template, tokenizer, int(key))
        for context in (minimum, minimum + 1, 3 * minimum + 7):
            window = build_window(trial, context, depth)
            text = tokenizer.decode(window)
            assert window.shape == (context,)
            assert text.startswith(template.intro)
            assert template.needle.format(key=key) in text
            assert text.endswith(template.question + template.answer.format(key=key))
            room = context - trial.fixed
            before = tokenizer.decode(window[len(trial.intro) :][: round(depth * room)])
            assert text[len(template.intro) + len(before) :].startswith(
                template.needle.format(key=key)
            )


def test_depth_places_the_needle_and_filler_beside_it_is_whole():
    tokenizer = Pieces(r".")
    trial = tokenize_trial(STANDARD, tokenizer, 12345)
    for depth in (0.25, 0.5, 0.75):
        text = tokenizer.decode(build_window(trial, 2_000, depth))
        start = text.index(" The pass key is 12345")
        room = 2_000 - trial.fixed
        assert start - len(STANDARD.intro) == round(depth * room)
        assert text[:start].endswith("There and back again.")
        assert text[start + len(STANDARD.needle.format(key=12345)) :].startswith(
            " The grass is green."
        )


def test_answers_are_the_natural_tokens_of_question_and_answer(tokenizer):
    for key in draw_keys(1, 20, seed=0).flat:
        trial = tokenize_trial(STANDARD, tokenizer, int(key))
        text = STANDARD.question + STANDARD.answer.format(key=key)
        assert trial.question + trial.answer == tokenizer.encode(text)
        if not tokenizer.pattern.pattern.startswith("is"):
            assert trial.question == tokenizer.encode(STANDARD.question)
            assert tokenizer.decode(trial.answer) == f" {key}"
        else:  # the token that straddles the border is part of the answer
            assert tokenizer.decode(trial.answer) == f"is {key}"


def test_keys_have_five_digits_and_are_fixed_by_the_seed():
    keys = draw_keys(40, 50, seed=7)
    assert keys.min() >= 10_000
    assert keys.max() <= 99_999
    assert len(np.unique(keys)) > 1_900
    np.testing.assert_array_equal(keys, draw_keys(40, 50, seed=7))
    assert (keys != draw_keys(40, 50, seed=8)).any()


def sees(window):
    """A model that copies the key if the needle lies within its last ``window`` tokens."""

    def scorer(tokens, targets):
        hits = np.zeros(targets.shape, bool)
        for row, (read, target) in enumerate(zip(tokens, targets, strict=True)):
            end = len(read) - len(target) + 1  # where the answer begins in the input
            context = read[max(0, end - window) : end].tolist()
            found = any(
                context[i : i + len(target)] == target.tolist() for i in range(len(context))
            )
            hits[row] = found
        return np.where(hits, 0.25, 2.0).astype(np.float32), hits

    return scorer


def run(scorer, tokenizer, template=COMPACT, **changes):
    arguments = dict(contexts=(200, 800), depths=(0.0, 0.5, 1.0), trials=6, seed=5,
                     batch_tokens=4_000) | changes  # fmt: skip
    return score_passkey(scorer, tokenizer, template, **arguments)


def test_a_model_with_a_known_window_gets_exactly_its_accuracy():
    """Characters: the needle's key ends `room * (1 - depth)` + question + '.' before the answer."""
    tokenizer = Pieces(r".")
    fixed = tokenize_trial(COMPACT, tokenizer, 12345).fixed
    for window in (10, 20, 120, 250, 500, 10_000):
        rows = run(sees(window), tokenizer)
        for row in rows:
            room = row["context"] - fixed
            after = room - round(row["depth"] * room)
            distance = len(" 12345.") + after + len(COMPACT.question)
            expected = 6 if distance <= window else 0
            assert (row["correct"], row["total"]) == (expected, 6)
            assert row["tokens"] == 6 * len(" 12345")
            assert row["nats"] == row["tokens"] * (0.25 if expected else 2.0)
    assert len(rows) == 2 * 3


def test_only_answer_tokens_count_where_answers_differ_in_length():
    tokenizer = Pieces(TOKENIZERS["odd digit groups"])
    keys = draw_keys(3, 6, seed=5)
    lengths = np.array(
        [len(tokenize_trial(COMPACT, tokenizer, int(key)).answer) for key in keys.flat]
    ).reshape(keys.shape)
    assert lengths.min() < lengths.max()

    def scorer(tokens, targets):
        digits = np.array(
            [[tokenizer.decode([t]).strip().isdigit() for t in row] for row in targets]
        )
        return np.where(digits, 1.0, 100.0).astype(np.float32), digits

    for row in run(scorer, tokenizer):
        depth = (0.0, 0.5, 1.0).index(row["depth"])
        assert row["correct"] == row["total"] == 6
        assert row["nats"] == row["tokens"] == lengths[depth].sum()


def test_teacher_forcing_agrees_with_greedy_decoding():
    """A model that is right token by token with chance 0.8, by a hash of what it has read."""
    tokenizer = Pieces(r".")
    keys = draw_keys(2, 150, seed=5)

    def most_likely(read, answer_so_far, key):
        text = f" {key}"[len(answer_so_far)]
        mixed = hash((tuple(int(t) for t in read[-40:]), len(answer_so_far), key)) % 100
        return tokenizer.ids[text] if mixed < 80 else tokenizer.ids["t"]

    parts = [tokenize_trial(COMPACT, tokenizer, int(key)) for key in keys.flat]
    tokenizer.encode("t")
    greedy = []
    for key, part in zip(keys.flat, parts, strict=True):
        prompt = build_window(part, 300, 0.5)[: -len(part.answer)].tolist()
        written = []
        for _ in part.answer:
            written.append(most_likely(prompt + written, written, int(key)))
        greedy.append(written == part.answer)

    index = iter(range(10**6))

    def scorer(tokens, targets):
        hits = np.zeros(targets.shape, bool)
        for row in range(len(tokens)):
            key, target = int(keys.flat[next(index)]), targets[row].tolist()
            start = tokens.shape[1] - len(target) + 1
            for i in range(len(target)):
                read = tokens[row, : start + i].tolist()
                hits[row, i] = most_likely(read, target[:i], key) == target[i]
        return np.zeros(targets.shape, np.float32), hits

    rows = score_passkey(scorer, tokenizer, COMPACT, contexts=(300,), depths=(0.5, 0.5),
                         trials=150, seed=5, batch_tokens=300)  # fmt: skip
    assert [row["correct"] for row in rows] == [sum(greedy[:150]), sum(greedy[150:])]
    assert 20 < sum(greedy) < 200


def test_a_context_shorter_than_the_template_names_the_minimum():
    tokenizer = Pieces(r".")
    minimum = len(STANDARD.intro + STANDARD.needle.format(key=12345) + STANDARD.question) + 6
    with pytest.raises(ValueError, match=rf"200 tokens, too short .*'standard'.* least {minimum}"):
        run(sees(9), tokenizer, STANDARD, contexts=(200, 800))
    trial = tokenize_trial(STANDARD, tokenizer, 12345)
    with pytest.raises(ValueError, match=f"context of {minimum - 1} tokens; .* {minimum}"):
        build_window(trial, minimum - 1, 0.5)
    assert len(build_window(trial, minimum, 0.5)) == minimum


class NoDigits(Pieces):
    def decode(self, ids):
        return re.sub(r"\d", "?", super().decode(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(trials=0), "passkey_trials is 0; accepted: 1"),
        (dict(depths=(0.5, 1.5)), "depth is 1.5; accepted: 0 to 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(sees(9), Pieces(r"."), **changes)


def test_a_tokenizer_that_loses_digits_is_named():
    with pytest.raises(ValueError, match=r"template 'compact': .* key \d{5} as ' \?{5}'"):
        run(sees(9), NoDigits(r"."))
