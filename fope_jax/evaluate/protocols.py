"""What a protocol is, and the table of those on text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fope_jax.data.bos import Bos
from fope_jax.evaluate.metrics import Row
from fope_jax.evaluate.packed import check_chunks, score_chunks, score_resets
from fope_jax.evaluate.perplexity import (
    check_scored,
    score_from_start,
    score_positions,
    score_same_tokens,
)
from fope_jax.evaluate.progress import Progress
from fope_jax.evaluate.sliding import check_stride, score_sliding
from fope_jax.evaluate.variants import AS, Variant
from fope_jax.evaluate.windows import Windows, check_documents, place_blocks, place_windows
from fope_jax.position import to_spec
from fope_jax.report.rows import NO_BOS
from fope_jax.storage.protocol_names import PROTOCOLS


@dataclass(frozen=True)
class Protocol:
    """A measurement on one checkpoint.

    Attributes:
      kind: ``kind`` of its rows.
      identity: fields of all its rows, unique among the protocols of that kind.
      settings: everything else that its numbers depend on, as JSON values.
      run: (scorer, progress) -> (rows, windows or None).
      is_generative: ``run`` takes an ``Answerer`` instead of a scorer.
      reads_texts: ``run`` takes ``RowPrograms`` instead.
      bos: how windows begin, in words.
      bos_token: name of the BOS token that windows begin with, None without one.
      is_random: whether positions are drawn, see ``evaluate.random_positions``.
      variant: label of the position embedding in place of the run's own, "" without.
    """

    kind: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    run: Callable[[Any, Progress], tuple[list[Row], Windows | None]]
    is_generative: bool = False
    reads_texts: bool = False
    bos: str = NO_BOS
    bos_token: str | None = None
    is_random: bool = False
    variant: str = ""

    @property
    def row_fields(self) -> dict[str, Any]:
        """Fields of all its rows. ``bos_token`` keeps rows with and without BOS in two curves."""
        positions = "random" if self.is_random else ""
        stated = {"bos_token": self.bos_token, "positions": positions, AS: self.variant}
        return self.identity | {name: value for name, value in stated.items() if value}

    @property
    def label(self) -> str:
        label = "{} ({})".format(*self.identity.values())
        return f"{label} {AS} {self.variant}" if self.variant else label

    def with_bos(self, bos: Bos | None, beginning: str) -> Protocol:
        """This protocol with BOS at the start of its windows, described by ``beginning``."""
        if bos is None:
            return self
        settings = self.settings | {"bos_token": bos.token}
        words = beginning.format(bos.token)
        return dataclasses.replace(self, settings=settings, bos=words, bos_token=bos.token)

    def under(self, variant: Variant) -> Protocol:
        """This protocol under another position embedding, which is one of its settings."""
        if not variant.label:
            return self
        settings = self.settings | {"position": to_spec(variant.position)}
        return dataclasses.replace(self, settings=settings, variant=variant.label)

    def owns(self, row: Row, step: int) -> bool:
        """Whether ``row`` belongs to this protocol at ``step``, with or without BOS."""
        return (
            row.get("kind") in (self.kind, "protocol")
            and row.get("step") == step
            and row.get(AS, "") == self.variant
            and all(row.get(key) == value for key, value in self.identity.items())
        )


# ---------------------------------------------------------------------------- the table


class TextProtocol(NamedTuple):
    """How a protocol on text is made.

    Attributes:
      kind: ``kind`` of its rows.
      score: (scorer, cache, **settings, batch_tokens, progress, bos) -> (rows, windows). Its
        argument names select its settings from the values in ``_text_protocol``.
      check: (cache, settings); raises ValueError before any device work.
      beginning: text for ``Protocol.bos`` where a BOS token is added.
    """

    kind: str
    score: Callable[..., Any]
    check: Callable[[Any, dict[str, Any]], Any] = lambda cache, settings: None
    beginning: str = "every window begins with {}, in place of its first token"


def _check_same_tokens(cache: Any, settings: dict[str, Any]) -> None:
    check_scored(settings["scored"], settings["contexts"])
    place_windows(
        cache.documents,
        longest=max(settings["contexts"]),
        scored=settings["scored"],
        total=settings["num_windows"],
    )


def _check_sliding(cache: Any, settings: dict[str, Any]) -> None:
    check_stride(settings["stride"], settings["contexts"])
    _check_whole_windows(cache, max(settings["contexts"]), settings["num_windows"])


def _check_long_window(cache: Any, settings: dict[str, Any]) -> None:
    _check_whole_windows(cache, settings["context"], settings["num_windows"])


def _check_whole_windows(cache: Any, context: int, num_windows: int) -> None:
    """Raises where no window of ``context`` tokens, all scored, lies in a document."""
    place_windows(cache.documents, longest=context, scored=context, total=num_windows)


def _check_chunks(cache: Any, settings: dict[str, Any]) -> None:
    check_chunks(settings["contexts"])
    length, blocks = math.lcm(*settings["contexts"]), settings["num_blocks"]
    place_blocks(cache.documents, length=length, total=blocks)


def _check_boundaries(cache: Any, settings: dict[str, Any]) -> None:
    length, blocks = math.lcm(*settings["contexts"]), settings["num_blocks"]
    place_blocks(cache.documents, length=length, total=blocks, require_boundary=True)


def _check_documents(cache: Any, settings: dict[str, Any]) -> None:
    check_documents(cache.documents)


CHUNKS_AND_DOCUMENTS = (
    "every chunk begins with {}, in place of its first token, and every document in it, in place "
    "of the end-of-document token before it"
)
DOCUMENTS = "every document is read after {}"
TEXT_PROTOCOLS = {
    "same-tokens": TextProtocol("perplexity", score_same_tokens, _check_same_tokens),
    "sliding-window": TextProtocol("perplexity", score_sliding, _check_sliding),
    "chunks": TextProtocol("perplexity", score_chunks, _check_chunks),
    "document-resets": TextProtocol(
        "perplexity", score_resets, _check_boundaries, CHUNKS_AND_DOCUMENTS
    ),
    "no-resets": TextProtocol("perplexity", score_resets, _check_boundaries),
    "long-window": TextProtocol("position", score_positions, _check_long_window),
    "from-start": TextProtocol("position", score_from_start, _check_documents, DOCUMENTS),
}


def protocol_names(wanted: Sequence[str]) -> tuple[str, ...]:
    """The names in ``wanted`` or, for "all", all names, in the order of ``PROTOCOLS``.

    >>> protocol_names(("passkey", "chunks"))
    ('chunks', 'passkey')

    Raises:
      ValueError: an unknown name.
    """
    for name in wanted:
        if name not in (*PROTOCOLS, "all"):
            raise ValueError(
                f"{name!r} is no protocol; accepted: {', '.join(PROTOCOLS)}, or all of them: all"
            )
    return PROTOCOLS if "all" in wanted else tuple(p for p in PROTOCOLS if p in wanted)
