"""Writes the token stream of a split into the shards of a token cache, so that it can go on.

A build works in a directory with the suffix ``.partial``, whose ``progress.json`` lists the
complete shards; renaming it at the end makes the cache appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data.cache_reader import BLOCK_ROW, token_dtype
from fope_jax.data.documents import TokenizedDocuments
from fope_jax.storage.files import file_sha256

_NAMES_SHOWN = 20


class WriteError(OSError):
    """A file of a build cannot be written, as on a full disk; the message names it."""


@contextlib.contextmanager
def writing_errors(place: str | Path) -> Iterator[None]:
    """Makes an OSError a WriteError, which also says how the build goes on."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{place} cannot be written: {error.strerror or error}; the same command goes on from"
            " what is complete"
        ) from error


@dataclass
class Progress:
    """What the complete shards of a split hold; a build continues from it.

    Attributes:
      documents, tokens: of each corpus, of documents that are complete in the shards, or empty.
      part_documents: documents of the parts of each corpus that were read, as far as it is known.
      inside: tokens of the next document that the shards hold already.
      last_start: where the last document that begins in the shards does.
      bytes: bytes of text of the documents that begin in the shards.
      changed_documents, first_changed: documents whose tokens decode to another text; some names.
      bad: unreadable documents, see `add_bad_document`.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    part_documents: dict[str, list[int]] = field(default_factory=dict)
    inside: int = 0
    last_start: int = -1
    bytes: int = 0
    empty_documents: int = 0
    changed_documents: int = 0
    first_changed: list[str] = field(default_factory=list)
    bad: dict[str, Any] = field(default_factory=lambda: {"count": 0, "digest": "", "first": []})
    complete: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)


class SplitWriter:
    """Writes the token stream of one split into shards.

    Args:
      token_bytes: ``[V]``, bytes of text of each token.
      prefix_bytes: bytes of the tokenizer's prefix, which are not part of the text.
      progress: where to continue; the caller skips the documents it counts.
      save: called with the progress when a shard is complete on disk.
      block_tokens, shard_tokens: a shard is a whole number of blocks.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        token_bytes: np.ndarray,
        progress: Progress,
        save: Callable[[Progress], None],
        block_tokens: int,
        shard_tokens: int,
        prefix_bytes: int = 0,
    ):
        self._directory, self._split, self._prefix_bytes = directory, split, prefix_bytes
        self._token_bytes, self._dtype = token_bytes, token_dtype(len(token_bytes))
        self._save, self._block_tokens, self._shard_tokens = save, block_tokens, shard_tokens
        self._now = dataclasses.replace(
            progress, documents=dict(progress.documents), tokens=dict(progress.tokens), inside=0
        )
        self._written = progress.inside  # tokens of the next document
        self._position = progress.num_tokens  # of the next token
        self._open_shard()

    def add(self, group: TokenizedDocuments) -> None:
        """Appends documents. One that is empty or bad is counted and leaves no token.

        Raises WriteError if the disk is full.
        """
        with writing_errors(self._scratch):
            self._add(group)

    def _add(self, group: TokenizedDocuments) -> None:
        now, corpus = self._now, group.corpus
        documents, tokens = now.documents.get(corpus, 0), now.tokens.get(corpus, 0)
        has_text = group.bytes > 0
        sizes = np.where(has_text, group.lengths, 0)
        ends = np.cumsum(sizes)
        stream = group.tokens
        if not has_text.all():
            stream = stream[np.repeat(has_text, group.lengths)]
        done, begun = self._written, int(self._written > 0)  # of the group, in the shards
        starts, self._written = self._position - done + ends - sizes, 0
        changed = self._is_changed(group)
        while len(stream) - done >= (room := self._shard_tokens - self._shard_size):
            done += room
            last = int(np.searchsorted(ends, done))  # the document that fills the shard
            self._begin(group, starts, changed, slice(begun, last + 1))
            self._append(stream[done - room : done])
            begun, is_whole = last + 1, ends[last] == done
            complete = last + int(is_whole)
            now.documents[corpus] = documents + complete
            now.tokens[corpus] = tokens + int(ends[complete - 1] if complete else 0)
            now.inside = 0 if is_whole else int(done - ends[last] + sizes[last])
            self._close_shard()
            self._open_shard()
        self._begin(group, starts, changed, slice(begun, None))
        self._append(stream[done:])
        now.documents[corpus] = documents + len(group.lengths)
        now.tokens[corpus], now.inside = tokens + len(stream), 0

    def _begin(
        self, group: TokenizedDocuments, starts: np.ndarray, changed: np.ndarray, part: slice
    ) -> None:
        """Counts the documents of ``part``, which begin in this shard or are without text."""
        now, sizes, names, bad = self._now, group.bytes[part], group.names[part], group.bad[part]
        for index in np.flatnonzero(sizes == 0).tolist():
            if bad[index]:
                now.bad = add_bad_document(now.bad, names[index], bad[index])
            else:
                now.empty_documents += 1
        kept = np.flatnonzero(sizes)
        now.bytes += int(sizes.sum())
        found = kept[changed[part][kept]]
        now.changed_documents += len(found)
        shown = found[: _NAMES_SHOWN - len(now.first_changed)].tolist()
        now.first_changed = [*now.first_changed, *(names[index] for index in shown)]
        self._starts.append(starts[part][kept])
        self._bytes.append(sizes[kept])
        self._names += [names[index] for index in kept.tolist()]

    def _is_changed(self, group: TokenizedDocuments) -> np.ndarray:
        """``[D]`` bool, documents whose tokens decode to another text."""
        token_bytes = np.append(0, np.cumsum(self._token_bytes[group.tokens], dtype=np.int64))
        ends = np.cumsum(group.lengths)
        sizes = token_bytes[ends] - token_bytes[ends - group.lengths]
        return group.changed | (sizes - self._prefix_bytes != group.bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream so far."""
        return self._position

    @property
    def bad(self) -> dict[str, Any]:
        """The unreadable documents so far, see `add_bad_document`."""
        return self._now.bad

    def finish(self) -> Progress:
        """Closes the last shard, whose last block may be shorter."""
        self._now.complete = True
        with writing_errors(self._scratch):
            if self._shard_size:
                self._close_shard()
            else:
                self._stream.close()
                self._scratch.unlink()
                self._save(self._now)
        return self._now

    def _append(self, tokens: np.ndarray) -> None:
        self._stream.write(tokens.astype(self._dtype).tobytes())
        self._shard_size += len(tokens)
        self._position += len(tokens)

    def _open_shard(self) -> None:
        self._name = f"{self._split}-{len(self._now.shards):05d}"
        self._scratch = self._directory / f"{self._name}.unfinished"
        self._stream = self._scratch.open("wb")
        self._shard_size = 0
        self._starts = [np.array([self._now.last_start], np.int64)]
        self._bytes: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._names: list[str] = []

    def _close_shard(self) -> None:
        self._stream.close()
        tokens, index, table = (
            self._directory / f"{self._name}.{suffix}"
            for suffix in ("tokens", "index", "documents.npz")
        )
        starts = np.concatenate(self._starts).astype("<i8")
        rows = index_rows(
            np.fromfile(self._scratch, self._dtype),
            starts,
            self._position - self._shard_size,
            self._block_tokens,
        )
        index.write_bytes(rows.tobytes() + starts.tobytes())
        np.savez(
            table,
            bytes=np.concatenate(self._bytes),
            names=np.frombuffer(json.dumps(self._names).encode(), np.uint8),
        )
        for path in (self._scratch, index, table):
            _sync(path)
        os.replace(self._scratch, tokens)
        entry = {"file": tokens.name, "tokens": self._shard_size, "sha256": file_sha256(tokens)}
        entry["index"] = {"file": index.name, "sha256": file_sha256(index)}
        documents = {"file": table.name, "count": len(self._names), "sha256": file_sha256(table)}
        self._now.shards = [*self._now.shards, entry | {"documents": documents}]
        self._now.last_start = int(starts[-1])
        self._save(self._now)


def index_rows(tokens: np.ndarray, starts: np.ndarray, begin: int, block: int) -> np.ndarray:
    """``[blocks]`` of `BLOCK_ROW` for a shard's ``tokens``.

    ``starts`` holds the last document start before token ``begin``, the shard's first, and those
    inside. A block's starts are that of the document of its first token, and those inside.
    """
    rows = np.zeros(-(-len(tokens) // block), BLOCK_ROW)
    edges = begin + np.arange(len(rows) + 1) * block
    first = np.searchsorted(starts, edges[:-1], side="right") - 1
    last = np.searchsorted(starts, edges[1:], side="left")
    rows["first_start"], rows["num_starts"] = first, last - first
    for number, (one, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        part = tokens[number * block : (number + 1) * block]
        rows["tokens_crc"][number] = zlib.crc32(part.tobytes())
        rows["starts_crc"][number] = zlib.crc32(starts[one:stop].tobytes())
    return rows


def add_bad_document(bad: dict[str, Any], name: str, reason: str) -> dict[str, Any]:
    """Adds an unreadable document to ``bad``: count, digest of all names, first reasons."""
    name = name.rpartition("/")[2]  # the digest must not depend on where the files are
    names = f"{bad['digest']} {name}".encode(errors="surrogateescape")
    return {
        "count": bad["count"] + 1,
        "digest": hashlib.sha256(names).hexdigest(),
        "first": [*bad["first"], reason][:_NAMES_SHOWN],
    }


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
