"""Which tokens of a cache are scored: windows inside documents, or blocks of packed documents.

Choices depend only on documents' lengths, so all variants are scored on the same tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from fope_jax.config import Experiment

log = logging.getLogger(__name__)


class TooShortError(ValueError):
    """A text has no window of the longest length; shorter lengths may have one."""


class Windows(NamedTuple):
    """The windows of one protocol, in the order of the cache.

    Attributes:
      stop: ``[W]`` int64, index in the cache one past the last target. A window reads tokens
        ``[stop - context - 1, stop)``; inputs are all but the last, targets all but the first.
      document: ``[W]`` int64, index of the document that holds the window.
      too_short: names of the documents shorter than the longest window.
    """

    stop: np.ndarray
    document: np.ndarray
    too_short: tuple[str, ...]


def allowed_contexts(
    experiment: Experiment, multiples: Collection[float]
) -> tuple[list[int], list[int]]:
    """Training length times each of ``multiples``, sorted: those that the position embedding is
    defined for, and those beyond. ValueError unless they are whole numbers of tokens."""
    length, limit = experiment.train.length, experiment.position.limits.max_length
    for multiple in multiples:
        if abs(length * multiple - round(length * multiple)) > 1e-6:
            raise ValueError(
                f"a context of {multiple} times train.length = {length} is {length * multiple:g} "
                "tokens: expected a whole number"
            )
    contexts = sorted({round(length * multiple) for multiple in multiples})
    inside = [n for n in contexts if limit is None or n <= limit]
    return inside, contexts[len(inside) :]


def context_lengths(experiment: Experiment, multiples: Collection[float], what: str) -> list[int]:
    """Training length times each of ``multiples``, sorted and unique.

    A multiple as large as the training length is warned of: it may be meant as tokens.

    Raises:
      ValueError: one is no whole number of tokens, or the longest exceeds the limit of the position
        embedding; ``what`` asks for it.
    """
    contexts, beyond = allowed_contexts(experiment, multiples)
    length, limit = experiment.train.length, experiment.position.limits.max_length
    if beyond:
        raise ValueError(
            f"{what} reach {beyond[-1]} tokens, but {type(experiment.position).__name__} is "
            f"defined for at most {limit}; evaluate multiples of train.length = {length} up to "
            f"{(limit or 0) // length}"
        )
    if large := [multiple for multiple in multiples if multiple >= length]:
        log.warning(
            "%s = %s count training lengths, not tokens: of %d tokens each, up to %s tokens",
            what,
            ", ".join(f"{multiple:g}" for multiple in large),
            length,
            f"{contexts[-1]:,}",
        )
    return contexts


def share_evenly(capacity: np.ndarray, total: int) -> np.ndarray:
    """Shares ``total`` windows over documents, as equally as their capacities ``[D]`` allow.

    Without this one long document would decide the average. Evenly spaced documents get the rest.

    >>> share_evenly(np.array([2, 100, 100]), 12)
    array([2, 5, 5])
    """
    capacity = np.asarray(capacity, dtype=np.int64)
    shares = np.zeros_like(capacity)
    remaining = min(int(total), int(capacity.sum()))
    while remaining:
        free = np.flatnonzero(shares < capacity)
        if remaining < len(free):
            free = free[_evenly_spaced(len(free), remaining)]
        added = np.minimum(max(1, remaining // len(free)), capacity[free] - shares[free])
        shares[free] += added
        remaining -= int(added.sum())
    return shares


def _evenly_spaced(size: int, count: int) -> np.ndarray:
    """``count`` distinct indices below ``size``, each in the middle of an equal share."""
    return ((np.arange(count) + 0.5) * size / count).astype(np.int64)


def check_documents(documents: np.ndarray) -> None:
    """Raises TooShortError where there are none."""
    if not len(documents):
        raise TooShortError(
            "there are no documents, as in a run of tasks alone (data.corpus = none); "
            "`fope evaluate` takes a text as --config.evaluate.texts=NAME=GLOB, `fope spectrum` as "
            "--text NAME=GLOB"
        )


def place_windows(documents: np.ndarray, *, longest: int, scored: int, total: int) -> Windows:
    """Places at most ``total`` windows of up to ``longest`` tokens inside single documents.

    A document is divided into slots of ``scored`` targets. The first slot ends with target
    ``longest``, and a tail shorter than a slot is left out. Windows take evenly spaced slots, so no
    target is scored twice. ``documents`` has fields ``name``, ``start`` and ``length`` (tokens).

    Raises:
      TooShortError: no document has ``longest + 1`` tokens.
      ValueError: ``scored`` or ``total`` is out of range.
    """
    if not 1 <= scored <= longest:
        raise ValueError(f"scored_tokens is {scored}; accepted: 1 to the window's {longest} tokens")
    if total < 1:
        raise ValueError(f"the number of windows is {total}; accepted: 1 or more")
    lengths = np.asarray(documents["length"], dtype=np.int64)
    starts = np.asarray(documents["start"], dtype=np.int64)
    check_documents(documents)
    # A window of n inputs needs n + 1 tokens: the last is only a target.
    capacity = np.maximum(0, (lengths - longest - 1) // scored + 1)
    if not capacity.any():
        raise TooShortError(
            f"no document is long enough for a window of {longest} tokens: that takes "
            f"{longest + 1}, and the longest of {len(lengths)} documents has "
            f"{lengths.max(initial=0)}; evaluate shorter lengths or longer documents, or join them "
            "(protocol chunks)"
        )
    shares = share_evenly(capacity, total)
    slots = [_evenly_spaced(*pair) for pair in zip(capacity, shares, strict=True)]
    document = np.repeat(np.arange(len(shares)), shares)
    stop = starts[document] + longest + 1 + np.concatenate(slots) * scored
    return Windows(stop, document, tuple(str(name) for name in documents["name"][capacity == 0]))


def place_blocks(
    documents: np.ndarray, *, length: int, total: int, require_boundary: bool = False
) -> np.ndarray:
    """First tokens ``[W]`` int64, as indices in the cache, of blocks of ``length`` packed tokens.

    The stream is cut at multiples of ``length``. At most ``total`` evenly spaced blocks are taken;
    with ``require_boundary`` only blocks in which a document begins after the first token.

    Raises:
      TooShortError: no document, or no such block.
      ValueError: ``total`` is out of range, or no block has a boundary.
    """
    if total < 1:
        raise ValueError(f"the number of blocks is {total}; accepted: 1 or more")
    check_documents(documents)
    starts = np.asarray(documents["start"], dtype=np.int64)
    size = int(starts[-1] + documents["length"][-1])
    blocks = np.arange((size - 1) // length, dtype=np.int64)
    if not len(blocks):
        raise TooShortError(
            f"the {len(starts)} documents joined have {size} tokens, and a block of {length} takes "
            f"{length + 1}; evaluate shorter lengths, or such that the longest is a multiple of all"
        )
    if require_boundary:
        inside = starts[(starts % length > 0) & (starts // length < len(blocks))]
        blocks = np.unique(inside // length)
        if not len(blocks):
            raise ValueError(
                f"no two documents meet inside a block of {length} tokens of the joined "
                f"{len(starts)} documents; there is nothing that resets could change"
            )
    return blocks[_evenly_spaced(len(blocks), min(total, len(blocks)))] * length


def position_buckets(context: int, training_length: int) -> list[tuple[int, int]]:
    """Half-octave buckets of positions ``[start, stop)``, with the training length as an edge.

    Edges are ``training_length * 2**(k/2)`` from 1/32 of it to ``context``, and 0.

    >>> position_buckets(64, 32)[-3:]
    [(23, 32), (32, 45), (45, 64)]
    """
    octaves = np.arange(-10, 2 * np.log2(max(1.0, context / training_length)) + 1)
    edges = np.round(training_length * 2.0 ** (octaves / 2)).astype(np.int64)
    edges = np.unique(np.concatenate([[0], edges[(edges > 0) & (edges < context)], [context]]))
    return list(itertools.pairwise(edges.tolist()))
