"""Scores of written answers: known values, and what must hold for any texts."""

import random

import pytest

from fope_jax.evaluate.downstream.metrics import (
    classification,
    contains,
    exact_match,
    f1,
    normalize,
    rouge_l,
)

WORDS = ["a", "the", "old", "bridge", "over", "Loire,", "river.", "was", "built", "in", "1828"]


def texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


def test_f1_counts_each_word_as_often_as_both_have_it():
    assert f1("Loire, loire and the Seine", "the Loire") == pytest.approx(2 * 1 / (4 + 1))
    assert f1("river river", "a river river bridge") == pytest.approx(2 * 2 / (2 + 3))
    assert f1("", "x") == f1("the", "a") == f1("no", "yes") == 0
    for one, other in zip(texts(60), texts(60, seed=1), strict=True):
        assert f1(one, other) == pytest.approx(f1(other, one))
        same = sorted(normalize(one).split()) == sorted(normalize(other).split())
        assert (f1(one, other) == 1) == (same and bool(normalize(one)))
        assert exact_match(one, other) <= f1(one, other) or not normalize(one)
        assert exact_match(one, other) <= contains(one, other)


def test_rouge_l_is_the_packages():
    # Common subsequence "cat sat" of "the cat sat" and "cat sat on"; the package adds 1e-8.
    assert rouge_l("the cat sat", "cat sat on") == pytest.approx(2 / 3, rel=1e-6)
    # By sentence: within one the order counts, between two it does not; words count once.
    assert rouge_l("sat cat", "cat sat") == pytest.approx(1 / 2, rel=1e-6)
    assert rouge_l("sat. cat", "cat. sat") == pytest.approx(1, rel=1e-6)
    for empty in ("", ".", "..."):
        assert rouge_l(empty, "cat") == rouge_l("cat", empty) == 0
    assert rouge_l(" ", "cat") == 0


def test_a_sentence_too_long_for_the_package_gets_nothing_and_it_is_said(caplog):
    long = " ".join(f"w{i}" for i in range(1200))
    assert rouge_l(long, "w0") == 0
    assert "cannot score a sentence so long" in caplog.text


def test_a_class_is_right_where_it_alone_is_named():
    names = ["City", "Other city", "State", "state"]
    score = classification(names)
    assert score("a City", "City") == 1
    assert score("City or State", "City") == 1 / 2
    assert score("Other city", "Other city") == 1
    assert score("nothing", "City") == score("State", "City") == 0
    # The name of a part of the right one does not count against it.
    assert classification(["number", "a number"])("a number", "a number") == 1
    assert classification(["number", "a number"])("a number", "number") == 1 / 2
