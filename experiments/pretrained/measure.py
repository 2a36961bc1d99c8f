"""One unit on one model: the loss of a window by blocks, or the keys that it finds in one."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.pretrained.units import LONGEST, PLACES, SCORED
from fope_jax.data.held_out import read_held_out
from fope_jax.data.retrieval.base import Trial
from fope_jax.data.retrieval.registry import make_task
from fope_jax.data.retrieval.text_task import CorpusHaystack
from fope_jax.evaluate.generation import Answerer
from fope_jax.evaluate.perplexity import score_in_cache, token_sums
from fope_jax.evaluate.retrieval import TrialGrid, longest_answer, score_windows_of_trials
from fope_jax.evaluate.run_data import RunData
from fope_jax.evaluate.scoring import Scorer
from fope_jax.evaluate.windows import place_blocks, place_windows

BLOCK = 1024  # targets whose nats are added up
TRIAL_SEED = 0


class Text:
    """A held-out text, and where its windows end.

    Books are read inside one book. No article of the news fills a window, so they are joined.
    """

    def __init__(self, name: str, data: RunData) -> None:
        books = data.open("validation")
        if name == "books":
            self.cache: Any = books
            placed = place_windows(books.documents, longest=LONGEST, scored=SCORED, total=PLACES)
            order = _in_turn(placed.document)
            self.stops, document = placed.stop[order], placed.document[order]
            self.names = [str(books.documents["name"][index]) for index in document]
        else:
            self.cache = read_held_out(name, books.tokenizer, data.config)
            begin = place_blocks(self.cache.documents, length=LONGEST, total=PLACES)
            self.stops, self.names = begin + LONGEST + 1, [f"joined {name}"] * len(begin)


def _in_turn(document: np.ndarray) -> list[int]:
    """Indices of windows, the first of each document before the second of any.

    >>> _in_turn(np.array([4, 4, 7, 7, 7]))
    [0, 2, 1, 3, 4]
    """
    turn = [int((document[:index] == document[index]).sum()) for index in range(len(document))]
    return sorted(range(len(document)), key=lambda index: (turn[index], index))


def measure_loss(scorer: Scorer, text: Text, context: int, window: int) -> dict[str, Any]:
    """Sums over blocks of ``BLOCK`` targets of a window that ends in the same token at any context.

    So the last blocks hold the same targets at every context, with ever more text before them.

    Returns:
      ``document``, ``stop`` (one past the last target in the text), ``block``, and lists over the
      blocks: ``nats, tokens, bytes, correct``.

    Raises:
      ValueError: the text has fewer windows.
    """
    if window >= len(text.stops):
        raise ValueError(
            f"window {window}: the text has {len(text.stops)} of {LONGEST} tokens; give fewer "
            "--windows"
        )
    stop = int(text.stops[window])
    begin = np.array([stop - context - 1])
    nats, hits, targets = score_in_cache(
        scorer, text.cache, begin, context, context, batch_tokens=context
    )
    edges = [slice(at, at + BLOCK) for at in range(0, context, BLOCK)]
    blocks = [
        token_sums(nats[0, edge], hits[0, edge], targets[0, edge], text.cache.tokenizer.token_bytes)
        for edge in edges
    ]
    sums = {name: [block[name] for block in blocks] for name in blocks[0]}
    return {"document": text.names[window], "stop": stop, "block": BLOCK, **sums}


def key_trials(cache: Any, haystack: str, context: int, window: int) -> list[Trial]:
    """The ten trials of one window of `every_key` in "noise" or in the "corpus" of a cache."""
    task = make_task(
        "every_key", cache.tokenizer, CorpusHaystack(cache) if haystack == "corpus" else None
    )
    assert task.depths is not None
    grid = TrialGrid([context], task.depths, PLACES, TRIAL_SEED)
    return [grid.draw(task, number, context) for number in grid.windows(task)[window]]


def measure_keys(
    answerer: Answerer, cache: Any, haystack: str, context: int, window: int
) -> dict[str, Any]:
    """What is found of the ten keys of a window, in lists over their depths.

    Returns:
      ``correct`` whether greedy decoding writes the number, ``rank`` of the right one among the
      ten numbers of the window, ``nats`` of the right number's tokens.
    """
    trials = key_trials(cache, haystack, context, window)
    (scores,) = score_windows_of_trials(
        answerer, cache.tokenizer, [trials], 1, longest_answer(trials)
    )
    rows = {
        name: [score[field] for score in scores]
        for name, field in (("correct", "correct"), ("rank", "rank_sum"), ("nats", "nats"))
    }
    return {"tokens": scores[0]["tokens"], **rows}
