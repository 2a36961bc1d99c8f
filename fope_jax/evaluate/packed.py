"""Perplexity of packed documents, in chunks.

The documents of a split are joined, each with its end-of-document token. Evenly spaced blocks of
the stream are cut into chunks of ``context`` tokens, for every context.

- ``chunks`` is the evaluation of the paper's code (Hua et al. 2025, from OLMo), which scores all
  chunks. A chunk of T tokens is one segment at positions 0 to T - 1. Its first token is not scored,
  so contexts differ in what they score.
- ``document-resets`` and ``no-resets`` score blocks that hold a border between documents, with and
  without segments and positions that restart at each document. The last token of a chunk predicts
  the token after it, so all tokens but the first of a document are scored at every context.

With ``bos`` a chunk begins with that token in place of its first. With resets each document does
too, in place of the end-of-document token before it, which is then only a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fope_jax.config import ConfigError
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import document_rows, score_in_cache
from fope_jax.evaluate.scoring import Scorer
from fope_jax.evaluate.windows import Windows, place_blocks
from fope_jax.model.masks import TokenIndex


def check_chunks(contexts: Sequence[int]) -> None:
    """Raises ConfigError where a chunk would have no token to score."""
    if min(contexts) < 2:
        raise ConfigError(
            f"a chunk of {min(contexts)} token has none to score, since its first is only read; "
            "accepted: contexts of 2 tokens or more"
        )


def score_chunks(
    scorer: Scorer, cache: Any, *, contexts: Sequence[int], num_blocks: int, **settings: Any
) -> tuple[list[Row], Windows]:
    """Scores blocks in chunks of each context. A block is their least common multiple of tokens.

    Returns:
      Rows for each context and document with ``context, scored_per_window``, and the blocks.
      ``windows`` counts chunks with a scored token of the document.

    Raises:
      ValueError: a context is below 2 tokens, or the stream has no whole block.
    """
    check_chunks(contexts)
    blocks = place_blocks(cache.documents, length=math.lcm(*contexts), total=num_blocks)
    return _score_blocks("chunks", scorer, cache, blocks, contexts, **settings)


def score_resets(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    num_blocks: int,
    reset: bool,
    **settings: Any,
) -> tuple[list[Row], Windows]:
    """As ``score_chunks``, for blocks that hold a border between documents.

    ``reset``: whether each document in a chunk is a segment with positions from 0.

    Raises:
      ValueError: no block holds a border between documents.
    """
    length = math.lcm(*contexts)
    blocks = place_blocks(cache.documents, length=length, total=num_blocks, require_boundary=True)
    name = "document-resets" if reset else "no-resets"
    return _score_blocks(name, scorer, cache, blocks, contexts, **settings)


def _score_blocks(
    name: str,
    scorer: Scorer,
    cache: Any,
    blocks: np.ndarray,
    contexts: Sequence[int],
    *,
    bos: int | None = None,
    **settings: Any,
) -> tuple[list[Row], Windows]:
    length, starts = math.lcm(*contexts), np.asarray(cache.documents["start"], np.int64)
    rows = []
    for context in sorted(contexts):
        begin = (blocks[:, None] + np.arange(0, length, context)).ravel()

        def locate(i: int, begin=begin, context=context) -> TokenIndex:
            # With a BOS token a document begins one token earlier: BOS replaces that token.
            return packed_positions(starts - (bos is not None), begin[i], context)

        settings["locate"] = locate if name == "document-resets" else None
        settings |= {"bos": bos, "desc": f"{name}, context {context}"}
        scores = score_in_cache(scorer, cache, begin, context, context, **settings)
        at = begin[:, None] + 1 + np.arange(context)  # [W, T] index of each target in the cache
        document = np.searchsorted(starts, at, side="right") - 1
        if name == "chunks":  # the target of a chunk's last token lies outside the chunk
            document[:, -1] = -1
        else:
            document[starts[document] == at] = -1
        scored = context - 1 if name == "chunks" else context
        fields = {"context": int(context), "scored_per_window": int(scored)}
        rows += document_rows(fields, document, *scores, cache, np.isin(at, starts))
    documents = np.searchsorted(starts, blocks, side="right") - 1
    return rows, Windows(blocks + length, documents, ())


def packed_positions(starts: np.ndarray, begin: int, context: int) -> TokenIndex:
    """Positions and segments ``[T]`` of a chunk, restarting at each document as in training.

    ``starts [D]`` int64 and ``begin`` are indices in the cache: first tokens of documents and
    chunk.

    >>> positions, segments = packed_positions(np.array([0, 12, 14]), 10, 6)
    >>> positions.tolist(), segments.tolist()
    ([0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 3, 3])
    """
    at = begin + np.arange(context)
    document = np.searchsorted(starts, at, side="right") - 1
    positions = at - np.maximum(starts[document], begin)
    return TokenIndex(positions.astype(np.int32), (document - document[0] + 1).astype(np.int32))
