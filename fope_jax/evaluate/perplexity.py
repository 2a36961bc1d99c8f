"""Loss against context length and loss by position: sums of nats inside held-out documents.

Protocol ``same-tokens``: the same targets are scored at every context length, and only the text
before them grows. A difference between two lengths is then the effect of the context alone.

Protocol ``long-window``: every target of a long window is scored once, sorted by its position.
Buckets of positions hold different tokens, so only variants are comparable at a bucket, and
buckets of one variant only as far as the text is alike throughout a document.

Protocol ``from-start``: documents are read from their first token, so that a target's position is
its distance since the document's start. A document shorter than the window is scored to its end;
far buckets hold the longer documents alone.

Windows begin with a token of the text, which is read and not scored. With ``bos``, a token for the
beginning of a sequence, they begin with that in its place, so that a window has as many tokens and
the same ones are scored; only ``from-start`` puts it before the text, and scores all of that. The
end-of-document token is a token of the text, of 0 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fope_jax.evaluate.scoring import Scorer, score_windows
from fope_jax.evaluate.windows import Windows, place_windows, position_buckets, share_evenly

Progress = Callable[..., Iterable[int]]


def no_progress(batches: Iterable[int], **_: Any) -> Iterable[int]:
    """The progress bar that shows nothing."""
    return batches


def token_sums(
    nats: np.ndarray, hits: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray
) -> dict[str, float | int]:
    """Sums over any set of scored targets, in float64.

    >>> token_sums(np.ones(2), np.array([True, False]), np.array([3, 0]), np.array([1, 1, 1, 4]))
    {'nats': 2.0, 'tokens': 2, 'bytes': 5, 'correct': 1}
    """
    return {
        "nats": float(nats.sum(dtype=np.float64)),
        "tokens": int(targets.size),
        "bytes": int(token_bytes[targets].sum(dtype=np.int64)),
        "correct": int(hits.sum()),
    }


def document_rows(
    shared: dict[str, Any],
    document: np.ndarray,
    nats: np.ndarray,
    hits: np.ndarray,
    targets: np.ndarray,
    cache: Any,
    first: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """One row for each document, with the sums over its targets.

    Args:
      shared: fields of every row.
      document: ``[W]`` or ``[W, S]`` int, index of the document of each window or target; a target
        of document -1 is not scored.
      nats, hits, targets: ``[W, S]``.
      cache: names the documents, and says the bytes of a token.
      first: ``[W, S]`` bool, which targets are the first token of their document, where any may be:
        it stands for the tokenizer's prefix as well, which is none of the document's text.

    Returns:
      Rows ``**shared, windows, nats, tokens, bytes, correct, document`` in the order of the cache;
      ``windows`` counts those with a scored target of the document.
    """
    own = np.broadcast_to(document.reshape(len(nats), -1), nats.shape)
    order = np.argsort(own, axis=None, kind="stable")
    found, begin = np.unique(own.ravel()[order], return_index=True)
    rows = []
    for index, part in zip(found, np.split(order, begin[1:]), strict=True):
        if index >= 0:
            windows = len(np.unique(part // nats.shape[1]))
            scored = nats.ravel()[part], hits.ravel()[part], targets.ravel()[part]
            sums = token_sums(*scored, cache.tokenizer.token_bytes)
            if first is not None and first.ravel()[part].any():
                sums["bytes"] -= len(getattr(cache.tokenizer, "prefix", "").encode())
            name = str(cache.documents["name"][index])
            rows.append({**shared, "windows": windows, **sums, "document": name})
    return rows


def score_same_tokens(
    scorer: Scorer,
    cache: Any,
    *,
    contexts: Sequence[int],
    scored: int,
    num_windows: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores the same targets with each number of tokens before them.

    Args:
      scorer: the model.
      cache: a token cache: ``documents``, ``tokens(start, stop)`` and ``tokenizer.token_bytes``.
      contexts: window lengths in tokens. Targets are chosen so that the longest fits into their
        document.
      scored: targets scored at the end of each window, at most the shortest context.
      num_windows: windows wanted over all documents.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``, e.g. ``tqdm``.
      bos: what windows begin with; None takes the text's own tokens.

    Returns:
      One row for each context and document: ``context, scored_per_window, windows, nats, tokens,
      bytes, correct, document``; and the windows, which name the documents too short.

    Raises:
      ValueError: no document holds the longest window, or ``scored`` exceeds the shortest.
    """
    if scored > min(contexts):
        raise ValueError(
            f"scored_tokens is {scored}, more than the shortest context of {min(contexts)} "
            "tokens; all scored tokens must fit into every window"
        )
    longest = max(contexts)
    windows = place_windows(cache.documents, longest=longest, scored=scored, total=num_windows)
    targets = np.stack([cache.tokens(stop - scored, stop) for stop in windows.stop])
    rows = []
    for context in sorted(contexts):
        nats, hits = score_windows(
            scorer,
            lambda i, context=context: cache.tokens(windows.stop[i] - context - 1, windows.stop[i]),
            len(windows.stop),
            context=context,
            scored=scored,
            batch_tokens=batch_tokens,
            progress=lambda batches, context=context: progress(
                batches, desc=f"same tokens, context {context}"
            ),
            bos=bos,
        )
        shared = {"context": int(context), "scored_per_window": int(scored)}
        rows += document_rows(shared, windows.document, nats, hits, targets, cache)
    return rows, windows


def score_positions(
    scorer: Scorer,
    cache: Any,
    *,
    context: int,
    training_length: int,
    num_windows: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores every target of long windows, and sums by position of the token that predicts it.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      context: tokens of a window.
      training_length: tokens the model was trained on; an edge between two buckets.
      num_windows: windows wanted over all documents; none overlap.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.
      bos: as of ``score_same_tokens``.

    Returns:
      One row for each bucket of positions ``[start, stop)`` and document: ``context, bucket,
      windows, nats, tokens, bytes, correct, document``; and the windows, which name the documents
      too short.
    """
    windows = place_windows(cache.documents, longest=context, scored=context, total=num_windows)
    nats, hits = score_windows(
        scorer,
        lambda i: cache.tokens(windows.stop[i] - context - 1, windows.stop[i]),
        len(windows.stop),
        context=context,
        scored=context,
        batch_tokens=batch_tokens,
        progress=lambda batches: progress(batches, desc=f"by position, window {context}"),
        bos=bos,
    )
    targets = np.stack([cache.tokens(stop - context, stop) for stop in windows.stop])
    owner = np.broadcast_to(windows.document[:, None], nats.shape)
    return _bucket_rows(context, training_length, owner, nats, hits, targets, cache), windows


def score_from_start(
    scorer: Scorer,
    cache: Any,
    *,
    context: int,
    training_length: int,
    num_documents: int,
    batch_tokens: int,
    progress: Progress = no_progress,
    bos: int | None = None,
) -> tuple[list[dict[str, Any]], Windows]:
    """Scores documents from their beginning, and sums by distance since it.

    Args:
      scorer: the model.
      cache: a token cache, as in ``score_same_tokens``.
      context: tokens read of a document at most; the rest of a longer one is not scored.
      training_length: tokens the model was trained on; an edge between two buckets.
      num_documents: documents wanted, evenly spaced; more than there are takes all.
      batch_tokens: upper bound of tokens in one forward pass.
      progress: called as ``progress(batches, desc=...)``.
      bos: as of ``score_same_tokens``.

    Returns:
      Rows as of ``score_positions``, for the buckets that a document reaches; and a window for
      each document, which name the documents that have no second token.

    Raises:
      ValueError: no document has two tokens.
    """
    documents = cache.documents
    before = [] if bos is None else [bos]
    lengths = np.asarray(documents["length"], np.int64) + len(before)
    lengths = np.minimum(lengths, context + 1)
    shares = share_evenly(lengths >= 2, num_documents)
    chosen = np.flatnonzero(shares)
    if not len(chosen):
        raise ValueError(
            f"none of {len(documents)} documents has 2 tokens, one to read and one to score"
        )
    start, length = np.asarray(documents["start"], np.int64)[chosen], lengths[chosen]
    texts = np.zeros((len(chosen), context + 1), np.int32)  # what fills a row up is not scored
    for row, first, size in zip(texts, start, length, strict=True):
        row[:size] = [*before, *cache.tokens(first, first + size - len(before))]
    nats, hits = score_windows(
        scorer,
        lambda i: texts[i],
        len(chosen),
        context=context,
        scored=context,
        batch_tokens=batch_tokens,
        progress=lambda batches: progress(batches, desc=f"from the start, window {context}"),
    )
    owner = np.where(np.arange(1, context + 1) < length[:, None], chosen[:, None], -1)
    too_short = tuple(str(name) for name in documents["name"][lengths < 2])
    begins = np.zeros(owner.shape, bool)
    begins[:, 0] = bos is not None  # then the first target is the first token of its document
    rows = _bucket_rows(context, training_length, owner, nats, hits, texts[:, 1:], cache, begins)
    return rows, Windows(start + length - len(before), chosen, too_short)


def _bucket_rows(
    context: int,
    training_length: int,
    owner: np.ndarray,
    nats: np.ndarray,
    hits: np.ndarray,
    targets: np.ndarray,
    cache: Any,
    first: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    rows = []
    for start, stop in position_buckets(context, training_length):
        shared, part = {"context": int(context), "bucket": [start, stop]}, np.s_[:, start:stop]
        scored = owner[part], nats[part], hits[part], targets[part]
        rows += document_rows(shared, *scored, cache, None if first is None else first[part])
    return rows
