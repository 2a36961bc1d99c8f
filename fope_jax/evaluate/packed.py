"""Perplexity of packed documents: chunks as in the paper's code, and what resets change.

The documents of a split lie one after the other, each with its end-of-document token. The stream
is cut into blocks, and each block into chunks of ``context`` tokens, for every context.

Protocol ``chunks``: what the released code of the paper does (Hua et al. 2025; its evaluation is
that of OLMo). A chunk of T tokens is read by itself as one sequence, with positions 0 to T - 1 and
documents not told apart. Its first token has nothing before it and is not scored; T - 1 of T
tokens are, so contexts differ in what they score. The released code takes every chunk of the file
but those that fill no batch; here evenly spaced blocks are taken, and the stream's tail is left.

Protocols ``document-resets`` and ``no-resets``: chunks of blocks in which documents meet, once with
positions and segments that begin anew at each document and once without. Each token of a chunk
predicts the one after it, the last one too, so that the same tokens are scored at every context:
all but the first of a document, which nothing of its own predicts.

With ``bos``, a token for the beginning of a sequence, a chunk begins with it in place of its first
token. With resets each document in it does too, in place of the end-of-document token before it,
which then is a target alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.perplexity import document_rows, score_in_cache
from fope_jax.evaluate.scoring import Scorer
from fope_jax.evaluate.windows import Windows, place_blocks
from fope_jax.model.attention import TokenIndex


def check_chunks(contexts: Sequence[int]) -> None:
    """Raises ValueError where a chunk would have no token to score."""
    if min(contexts) < 2:
        raise ValueError(
            f"a chunk of {min(contexts)} token has none to score, since its first is only read; "
            "accepted: contexts of 2 tokens or more"
        )


def score_chunks(
    scorer: Scorer, cache: Any, *, contexts: Sequence[int], num_blocks: int, **settings: Any
) -> tuple[list[Row], Windows]:
    """Scores blocks of the stream in chunks of each context, as the paper's code does.

    Args:
      contexts: tokens of a chunk. A block has as many as their least common multiple.
      num_blocks: blocks wanted, evenly spaced; more than there are takes all.

    Returns:
      Rows for each context and document with ``context, scored_per_window``, where ``windows``
      counts chunks with a scored token of the document; and the blocks.

    Raises:
      ValueError: a context below 2 tokens, or the stream has no whole block.
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
    """Scores blocks in which documents meet, with or without a new beginning at each document.

    As ``score_chunks``, with ``num_blocks`` of the blocks in which documents meet.

    Args:
      reset: whether each document in a chunk is a segment with positions from 0, which sees no
        other; otherwise the chunk is one segment.

    Raises:
      ValueError: no block in which documents meet.
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
            # With a BOS token a document begins one token earlier, where that stands.
            return packed_positions(starts - (bos is not None), begin[i], context)

        settings["locate"] = locate if name == "document-resets" else None
        settings |= {"bos": bos, "desc": f"{name}, context {context}"}
        scores = score_in_cache(scorer, cache, begin, context, context, **settings)
        at = begin[:, None] + 1 + np.arange(context)  # [W, T] index of each target in the cache
        document = np.searchsorted(starts, at, side="right") - 1
        if name == "chunks":  # the last token of a chunk has no target in it
            document[:, -1] = -1
        else:
            document[starts[document] == at] = -1
        scored = context - 1 if name == "chunks" else context
        fields = {"context": int(context), "scored_per_window": int(scored)}
        rows += document_rows(fields, document, *scores, cache, np.isin(at, starts))
    documents = np.searchsorted(starts, blocks, side="right") - 1
    return rows, Windows(blocks + length, documents, ())


def packed_positions(starts: np.ndarray, begin: int, context: int) -> TokenIndex:
    """Positions and segments ``[T]`` of a chunk whose documents each begin anew, as in training.

    Positions count from the beginning of the document or, where that lies before the chunk, of the
    chunk.

    Args:
      starts: ``[D]`` int64, where each document begins in the cache.
      begin: where the chunk does.
      context: tokens of the chunk T.

    >>> positions, segments = packed_positions(np.array([0, 12, 14]), 10, 6)
    >>> positions.tolist(), segments.tolist()
    ([0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 3, 3])
    """
    at = begin + np.arange(context)
    document = np.searchsorted(starts, at, side="right") - 1
    positions = at - np.maximum(starts[document], begin)
    return TokenIndex(positions.astype(np.int32), (document - document[0] + 1).astype(np.int32))
