"""Perplexity of joined documents: chunks as in the paper's code, and what resets change.

The documents of a split lie one after the other, each with its end-of-document token. The stream
is cut into blocks, and each block into chunks of ``context`` tokens, for every context.

Protocol ``chunks``: what the released code of the paper does (Hua et al. 2025; its evaluation is
that of OLMo). A chunk of T tokens is read by itself as one sequence, with positions 0 to T - 1 and
documents not told apart. Its first token has nothing before it and is not scored; T - 1 of T
tokens are, so contexts differ in what they score. The released code cuts the whole file, leaves
out the tail that fills no chunk, and the chunks that fill no batch; here the tail of the stream is
left out, and of the blocks the evenly spaced ones are taken that are asked for.

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

from fope_jax.evaluate.perplexity import Progress, document_rows, no_progress
from fope_jax.evaluate.scoring import Scorer, score_windows
from fope_jax.evaluate.windows import Windows, place_blocks
from fope_jax.model.attention import TokenIndex


def score_chunks(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    num_blocks: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores blocks of the stream in chunks of each context, as the paper's code does.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      contexts: tokens of a chunk. A block has as many as their least common multiple.
      num_blocks: blocks wanted, evenly spaced; more than there are takes all.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.
      bos: what a chunk begins with; None takes the text's own tokens.

    Returns:
      One row for each context and document: ``context, scored_per_window, windows, nats, tokens,
      bytes, correct, document``, where ``windows`` counts chunks with a scored token of the
      document; and the blocks.

    Raises:
      ValueError: a context below 2 tokens, or the stream has no whole block.
    """
    blocks = place_blocks(cache.documents, length=math.lcm(*contexts), total=num_blocks)
    check_chunks(contexts)
    return _score(scorer, cache, blocks, contexts, batch_tokens, progress, "chunks", bos)


def score_resets(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    num_blocks: int,
    reset: bool,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores blocks in which documents meet, with or without a new beginning at each document.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      contexts: tokens of a chunk, as in ``score_chunks``.
      num_blocks: blocks wanted, evenly spaced among those in which documents meet.
      reset: whether each document in a chunk is a segment with positions from 0, which sees no
        other; otherwise the chunk is one segment.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.
      bos: what a chunk begins with; None takes the text's own tokens.

    Returns:
      Rows as of ``score_chunks``, and the blocks.

    Raises:
      ValueError: no block in which documents meet.
    """
    length = math.lcm(*contexts)
    blocks = place_blocks(cache.documents, length=length, total=num_blocks, require_boundary=True)
    name = "document-resets" if reset else "no-resets"
    return _score(scorer, cache, blocks, contexts, batch_tokens, progress, name, bos)


def check_chunks(contexts: Sequence[int]) -> None:
    """Raises ValueError where a chunk would have no token to score."""
    if min(contexts) < 2:
        raise ValueError(
            f"a chunk of {min(contexts)} token has none to score, since its first is only read; "
            "accepted: contexts of 2 tokens or more"
        )


def _score(
    scorer: Scorer,
    cache: Any,
    blocks: np.ndarray,
    contexts: Sequence[int],
    batch_tokens: int,
    progress: Progress,
    name: str,
    bos: int | None,
) -> tuple[list[dict[str, Any]], Windows]:
    length, starts = math.lcm(*contexts), np.asarray(cache.documents["start"], np.int64)
    rows = []
    for context in sorted(contexts):
        begin = (blocks[:, None] + np.arange(0, length, context)).ravel()

        def read(i: int, begin=begin, context=context) -> np.ndarray:
            return cache.tokens(begin[i], begin[i] + context + 1)

        def locate(i: int, begin=begin, context=context) -> TokenIndex:
            # With a BOS token a document begins one token earlier, where that stands.
            return packed_positions(starts - (bos is not None), begin[i], context)

        nats, hits = score_windows(
            scorer,
            read,
            len(begin),
            context=context,
            scored=context,
            batch_tokens=batch_tokens,
            progress=lambda batches, context=context: progress(
                batches, desc=f"{name}, context {context}"
            ),
            locate=locate if name == "document-resets" else None,
            bos=bos,
        )
        at = begin[:, None] + 1 + np.arange(context)  # [W, T] place of each target in the cache
        document = np.searchsorted(starts, at, side="right") - 1
        if name == "chunks":  # the last token of a chunk has no target in it
            document[:, -1] = -1
        else:
            document[starts[document] == at] = -1
        targets = np.stack([read(i)[1:] for i in range(len(begin))])
        scored = context - 1 if name == "chunks" else context
        shared = {"context": int(context), "scored_per_window": int(scored)}
        first = np.isin(at, starts)
        rows += document_rows(shared, document, nats, hits, targets, cache, first)
    owners = np.searchsorted(starts, blocks, side="right") - 1
    return rows, Windows(blocks + length, owners, ())


def packed_positions(starts: np.ndarray, begin: int, context: int) -> TokenIndex:
    """Positions and segments of a chunk whose documents each begin anew, as in training.

    Args:
      starts: ``[D]`` int64, where each document begins in the cache.
      begin: where the chunk does.
      context: tokens of the chunk T.

    Returns:
      ``[T]`` int32 each; positions count from the beginning of the document or, where that lies
      before the chunk, of the chunk.

    >>> positions, segments = packed_positions(np.array([0, 12, 14]), 10, 6)
    >>> positions.tolist(), segments.tolist()
    ([0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 3, 3])
    """
    at = begin + np.arange(context)
    document = np.searchsorted(starts, at, side="right") - 1
    positions = at - np.maximum(starts[document], begin)
    return TokenIndex(positions.astype(np.int32), (document - document[0] + 1).astype(np.int32))
