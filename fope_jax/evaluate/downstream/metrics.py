"""Scores of written answers, from 0 to 1, as LongBench defines them.

Each takes what was written and one accepted answer; an item has the best score over its answers.

Reference: Bai et al. 2024, "LongBench: A Bilingual, Multitask Benchmark for Long Context
Understanding", Table 1, and ``LongBench/metrics.py`` of its repository at 2e00731.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from fope_jax.extras import require

log = logging.getLogger(__name__)

Metric = Callable[[str, str], float]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, words joined by single spaces.

    >>> normalize("The  Eiffel-Tower, in Paris.")
    'eiffeltower in paris'
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(written: str, answer: str) -> float:
    """1 where both are the same normalized text."""
    return float(normalize(written) == normalize(answer))


def contains(written: str, answer: str) -> float:
    """1 where the words of the answer stand in what was written, which may go on.

    >>> contains("It is the Black Sea, I think.", "Black Sea"), contains("blackboard", "black")
    (1.0, 0.0)
    """
    return float(f" {normalize(answer)} " in f" {normalize(written)} ")


def f1(written: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalized words, each as often as it stands.

    >>> f1("the old bridge of stone", "a stone bridge")
    0.6666666666666666
    """
    words, accepted = normalize(written).split(), normalize(answer).split()
    shared = sum((Counter(words) & Counter(accepted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(accepted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(written: str, answer: str) -> float:
    """F measure of ROUGE-L from the package ``rouge``, which LongBench uses; 0 without words.

    Sentences end at full stops; other packages split and weigh otherwise and give other numbers.
    """
    if not written.strip(".") or not answer.strip("."):
        return 0.0
    rouge = require("rouge", "downstream").Rouge(metrics=["rouge-l"])
    try:
        return rouge.get_scores([written], [answer], avg=True)["rouge-l"]["f"]
    except RecursionError:  # LongBench scores every error of the package 0
        log.warning("the package rouge cannot score a sentence so long, it gets 0: %.60r", written)
        return 0.0


def classification(classes: Sequence[str]) -> Metric:
    """1 over the number of class names written, where the right one is among them; else 0.

    A name that is part of the right one does not count.

    >>> classification(["City", "Other city", "State"])("Other city or State", "Other city")
    0.5
    """

    def score(written: str, answer: str) -> float:
        named = [name for name in classes if name in written]
        named = [name for name in named if name == answer or name not in answer]
        return 1 / len(named) if answer in named else 0.0

    return score
