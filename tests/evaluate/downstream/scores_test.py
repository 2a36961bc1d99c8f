"""Items scored on models whose tokens and likelihoods are known."""

import math

import numpy as np
import pytest

from fope_jax.data.bos import Bos
from fope_jax.data.tokenizers import BytesTokenizer
from fope_jax.evaluate.downstream.items import Item, ItemTask, written_metrics
from fope_jax.evaluate.downstream.longbench import metrics_of
from fope_jax.evaluate.downstream.scores import check_room, score_items
from fope_jax.evaluate.text_model import TextModel
from tests.evaluate.harness_test import successor

BYTES = BytesTokenizer()


class Writer:
    """Writes one text after every prompt, and keeps the prompts in the order it read them."""

    def __init__(self, text="ok", end=True):
        self.tokens = BYTES.encode(text) + [BYTES.eos_id] * end
        self.prompts, self.not_first = [], []

    def __call__(self, tokens, segments, count, not_first=()):
        self.prompts += [BYTES.decode(t[s == 1]) for t, s in zip(tokens, segments, strict=True)]
        self.not_first.append(not_first)
        row = (self.tokens + [BYTES.encode("x")[0]] * count)[:count]
        return np.tile(np.asarray(row, np.int32), (len(tokens), 1))


def model(write=None, **settings):
    return TextModel(successor, write or Writer(), BYTES, **({"max_length": None} | settings))


def own(*items, count=8):
    return ItemTask("file", "own", items, written_metrics, count, True, False, {})


def longbench(*items, metric="f1", count=8, one_line=True, ends=False):
    return ItemTask("longbench", "x", items, metrics_of(metric), count, one_line, ends, {})


def test_the_best_answer_counts_and_only_the_first_line():
    write = Writer("\n\nred apple\ngreen")
    items = (Item("a", "p", ("a pear", "the red apples apple")), Item("b", "q", ("green",)))
    rows, records = score_items(model(write), own(*items, count=30), 16)
    (row,) = rows
    assert row["scores"]["f1"][0] == pytest.approx(2 * 2 / (2 + 3) + 0)
    assert row["scores"]["exact_match"] == [0, 0]
    assert [record["pred"] for record in records] == ["\n\nred apple\ngreen"] * 2
    # A data set without examples in its prompt is scored as a whole.
    whole = longbench(*items, count=30, one_line=False)
    scores = score_items(model(write), whole, 16)[0][0]["scores"]["f1"]
    assert scores == pytest.approx([2 / 3 + 1 / 2, 4 / 9 + 1 / 4])


def test_long_prompts_lose_their_middle_and_it_is_counted():
    write = Writer()
    prompt = "abcdefghijklmnop"
    items = (Item("long", prompt, ("ok",)), Item("short", "abc", ("ok",)))
    rows, records = score_items(model(write, max_length=13), own(*items, count=4), 16)
    assert sorted(set(write.prompts)) == ["abc", "abcdmnop"]  # 13 - 4 = 9 tokens, 4 of each end
    assert rows == [
        {
            "multiples": [0, 1],
            "total": 2,
            "truncated": 1,
            "tokens": 19,  # of whole prompts
            "scores": dict.fromkeys(("contains", "f1", "exact_match"), [2.0, 2.0]),
        }
    ]
    assert [(r["tokens"], r["cut"]) for r in records] == [(16, 8), (3, 0)]
    # BOS is one of the first tokens.
    write.prompts.clear()
    bos = model(write, max_length=13, bos=Bos("<s>", BYTES.encode("^")[0]), add_bos=True)
    score_items(bos, own(items[0], count=4), 16)
    assert set(write.prompts) == {"^abcmnop"}


def test_writing_ends_at_a_line_break_that_is_not_first():
    write = Writer("one two\nthree", end=False)
    task = longbench(Item("a", "p", ("one two",)), metric="rouge_l", count=20, ends=True)
    rows, records = score_items(model(write), task, 16)
    assert records[0]["pred"] == "one two"
    assert write.not_first == [(BYTES.eos_id, BYTES.encode("\n")[0])]
    score_items(model(write), task._replace(ends_at_line_break=False), 16)
    assert write.not_first[1] == ()


def test_rows_are_sums_over_ranges_of_words_and_training_lengths():
    items = [
        Item(str(i), "p" * tokens, ("ok" if i % 2 else "no",), words=words)
        for i, (tokens, words) in enumerate(
            [(10, 5), (16, 3999), (17, 3999), (32, 4000), (33, 8000), (40, 9000), (20, 4000)]
        )
    ]
    rows, _ = score_items(model(), longbench(*items), training_length=16)
    assert [
        (row["words"], row["multiples"], row["total"], row["scores"]["f1"]) for row in rows
    ] == [
        ([0, 4000], [0, 1], 2, [1, 1]),
        ([0, 4000], [1, 2], 1, [0, 0]),
        ([4000, 8000], [1, 2], 2, [1, 1]),
        ([8000, None], [2, 4], 2, [1, 1]),
    ]
    assert sum(row["tokens"] for row in rows) == sum(len(item.prompt) for item in items)
    shuffled, _ = score_items(model(batch_tokens=64), longbench(*items[::-1]), training_length=16)
    assert shuffled == rows


def choices(prompt, answers, *texts):
    return Item(prompt, prompt, answers, texts)


def test_choices_are_ranked_by_likelihood_and_by_likelihood_a_character():
    """p(next byte) is 1/2 where it is the successor, else 1/4."""
    items = (
        choices("ab ", ("!",), "!", "b"),  # "!" follows the space: 1/2 against 1/4
        choices("ab", ("xyz",), "xyz", "q"),  # 1/4 1/4 1/2 1/2 of four bytes, 1/16 of two
    )
    rows, records = score_items(model(), own(*items), 16)
    (row,) = rows
    assert [record["pred"] for record in records] == ["!", "q"]
    assert row["scores"]["acc"] == [1, 1]
    # A third of log(1/64) is above log(1/16).
    assert row["scores"]["acc_norm"] == [2, 2]
    tie = choices("ab ", ("c",), "c", "d")
    assert score_items(model(), own(tie), 16)[0][0]["scores"]["acc"] == [0, 0]


def test_choices_follow_prompts_that_lost_their_middle():
    seen = []

    def score(tokens, segments, targets):
        seen.extend(BYTES.decode(t[s == 1]) for t, s in zip(tokens, segments, strict=True))
        return successor(tokens, segments, targets)

    long = choices("abcdefghijkl", ("m",), "m", "z")
    text = TextModel(score, None, BYTES, max_length=7)
    (row,), _ = score_items(text, own(long), 16)
    assert set(seen) == {"abcjkl "}
    assert (row["truncated"], row["tokens"]) == (1, 12)
    with pytest.raises(ValueError, match="item abcdefghijkl, choice .* leave no room for a prompt"):
        score_items(TextModel(score, None, BYTES, max_length=2), own(long), 16)


def test_scores_that_are_not_finite_are_an_error_by_item():
    def broken(tokens, segments, targets):
        nats, hits = successor(tokens, segments, targets)
        return nats + math.nan, hits

    with pytest.raises(ValueError, match="file own, item ab : log-likelihoods .* not finite"):
        score_items(TextModel(broken, None, BYTES, None), own(choices("ab ", ("x",), "x", "y")), 16)

    def nothing(tokens, segments, count):
        return np.full((len(tokens), count), -1)

    with pytest.raises(ValueError, match="after the prompt of item a are not finite"):
        score_items(model(nothing), own(Item("a", "p", ("x",))), 16)


def test_a_model_without_room_for_a_prompt_is_refused_by_name():
    task = own(Item("a", "p", ("x",)), count=8)
    check_room(task, None)
    check_room(task, 10)
    with pytest.raises(ValueError, match="8 tokens to write leave no room .* max_length = 9; .*10"):
        check_room(task, 9)
