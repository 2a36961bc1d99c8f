"""The token cache: the tokenized corpus on disk, written once, read at any position.

A split is one stream of tokens, ``document, EOS, document, EOS, ...``, cut into blocks of a length
that does not depend on the training length. A shard is an ArrayRecord file, one record a block:

    CACHE_DIR/gutenberg-sentencepiece4096-1a2b3c4d5e6f-0123456789ab/
        manifest.json                   config, sources, and the sha256 of every file below
        tokenizer.model
        train-00000.array_record        2,048 blocks of 16,384 tokens, uint16 if V <= 65,536
        train-00000.documents.npz       the documents that begin in this shard
        validation-00000.array_record ...

A build works in a directory with the suffix ``.partial``, whose ``progress.json`` lists the
complete shards; renaming it at the end makes the cache appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data import tokenizers
from fope_jax.data.cache_directories import base_directory, cache_directory, partial_directory
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.documents import TokenizedDocument
from fope_jax.data.manifest import (
    BUILD,
    MANIFEST,
    REBUILD,
    CacheError,
    MissingCacheError,
    file_hashes,
    read_manifest,
)
from fope_jax.data.mirror import download
from fope_jax.data.sources import damaged_files
from fope_jax.data.tokenizers import BytesTokenizer, Tokenizer
from fope_jax.extras import require
from fope_jax.storage.content import GIT_LFS_POINTER, detect_content, read_head
from fope_jax.storage.files import file_sha256
from fope_jax.storage.paths import check_bucket, is_in_bucket

BLOCK_TOKENS = 2**14
SHARD_TOKENS = 2**25
_BLOCKS_IN_MEMORY = 2048  # 64 MB of uint16: 32 M tokens are read from disk once
_OPEN_SHARDS = 256

DOCUMENT_DTYPE = np.dtype(
    [("name", object), ("start", np.int64), ("length", np.int64), ("bytes", np.int64)]
)


class TokenCache:
    """One split of a token cache; ``num_tokens`` counts one EOS per document.

    The sha256 of a shard is checked at its first read, ArrayRecord's checksum at every read.

    Attributes:
      fingerprint: hex digest of text, tokenizer and splits.
      summary: counts of the build, see `Progress`.
      sources: the text files of both splits.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str):
        self.directory, self.split = directory, split
        self.fingerprint: str = manifest["fingerprint"]
        self._tokenizer_description = manifest["tokenizer"]
        self._dtype = np.dtype(manifest["dtype"])
        self._block, self._shard = manifest["block_tokens"], manifest["shard_tokens"]
        self.summary: dict[str, Any] = manifest["splits"][split]
        self.sources: list[dict[str, Any]] = manifest.get("sources", [])
        self._shards: list[dict[str, Any]] = self.summary["shards"]
        self.num_tokens: int = sum(shard["tokens"] for shard in self._shards)
        # Bound to the instance: a deleted cache frees its blocks.
        self._read_block = functools.lru_cache(maxsize=_BLOCKS_IN_MEMORY)(self._read_block)
        self._open_reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_reader)
        self._check = functools.cache(self._check)
        for shard in self._shards:
            for file in (shard["file"], shard["documents"]["file"]):
                self._check_present(file)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)``, int32. IndexError: out of range. CacheError: damaged shard."""
        check_token_range(start, stop, self.num_tokens, self.split)
        if start == stop:
            return np.zeros(0, np.int32)
        first, last = start // self._block, (stop - 1) // self._block
        blocks = [self._read_block(i) for i in range(first, last + 1)]
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[start - first * self._block : stop - first * self._block].astype(np.int32)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """``[D]`` with fields name, start, length (tokens, EOS included) and bytes (of text)."""
        tables = [self._read_table(shard["documents"]) for shard in self._shards]
        return np.concatenate([np.zeros(0, DOCUMENT_DTYPE), *tables])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the cache was written with."""
        return tokenizers.load_tokenizer(self.directory, self._tokenizer_description)

    def verify(self) -> None:
        """Reads every file of the split; raises CacheError with the name of a damaged one."""
        for shard in self._shards:
            for entry in (shard, shard["documents"]):
                self._check(entry["file"], entry["sha256"])

    def _check_present(self, file: str) -> None:
        if not (self.directory / file).is_file():
            raise CacheError(f"token cache: {self.directory / file} is missing; {REBUILD}")

    def _check(self, file: str, expected: str) -> None:
        self._check_present(file)
        actual = file_sha256(self.directory / file)
        if actual != expected:
            is_pointer = detect_content(read_head(self.directory / file)) == GIT_LFS_POINTER
            what, advice = (
                (f"it is {GIT_LFS_POINTER.kind}; ", GIT_LFS_POINTER.advice)
                if is_pointer
                else ("", REBUILD)
            )
            raise CacheError(
                f"token cache: {self.directory / file} is damaged: {what}sha256 {actual[:16]}...,"
                f" expected {expected[:16]}...; {advice}"
            )

    def _open_reader(self, number: int):
        shard = self._shards[number]
        self._check(shard["file"], shard["sha256"])
        # No read-ahead, no helper threads: windows are shuffled and need one record at a time.
        return _array_record().ArrayRecordReader(
            str(self.directory / shard["file"]),
            "readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2 * self._block,
        )

    def _read_block(self, number: int) -> np.ndarray:
        shard, record = divmod(number, self._shard // self._block)
        size = min(self._block, self.num_tokens - number * self._block)
        reader = self._open_reader(shard)
        try:
            block = np.frombuffer(reader.read([record])[0], self._dtype)
            if len(block) != size:
                raise ValueError(f"{len(block)} tokens, expected {size}")
        except Exception as error:  # ArrayRecord's exceptions do not name the file
            raise CacheError(
                f"token cache: {self.directory / self._shards[shard]['file']} is damaged in record"
                f" {record} (of {self._block} tokens each): {error}; {REBUILD}"
            ) from error
        return block

    def _read_table(self, entry: dict[str, Any]) -> np.ndarray:
        self._check(entry["file"], entry["sha256"])
        path = self.directory / entry["file"]
        try:
            with np.load(path, allow_pickle=False) as columns:
                table = np.zeros(entry["count"], DOCUMENT_DTYPE)
                for name in ("start", "length", "bytes"):
                    table[name] = columns[name]
                table["name"] = json.loads(columns["names"].tobytes())
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise CacheError(
                f"token cache: {path} is no table of documents: {error}; {REBUILD}"
            ) from error
        return table


def check_token_range(start: int, stop: int, num_tokens: int, split: str) -> None:
    """Raises IndexError unless ``[start, stop)`` is within ``[0, num_tokens]``."""
    if not 0 <= start <= stop <= num_tokens:
        raise IndexError(f"tokens [{start}, {stop}) of {split}; accepted: within [0, {num_tokens}]")


def open_cache(config: DataConfig, split: str, fingerprint: str | None = None) -> TokenCache:
    """Opens one split of a cache of ``config``; needs neither TensorFlow nor text.

    A cache in a bucket is first copied to this machine, once: ArrayRecord reads only local files.

    Args:
      fingerprint: of the cache to open; None opens the one that was built last.

    Raises:
      MissingCacheError: the cache is not built.
      CacheError: it is damaged, or lacks more documents or files than ``config.max_bad_documents``
        or ``config.max_damaged_files`` allow.
      ValueError: ``split`` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; accepted: {SPLITS}")
    if config.corpus == "none":
        return TokenCache(base_directory(config), _no_text(BytesTokenizer()), split)
    check_bucket(config.cache_dir)
    directory = cache_directory(config, fingerprint)
    manifest = read_manifest(directory)
    if manifest is None:
        raise MissingCacheError(_describe_missing(config, directory, fingerprint))
    bad = manifest["splits"][split].get("bad_documents", 0)
    damaged = damaged_files(manifest.get("sources", []), split)
    problem = ""
    if bad > config.max_bad_documents:
        problem = (
            f"{bad} {split} documents that could not be read, more than max_bad_documents ="
            f" {config.max_bad_documents}; put the text right and"
        )
    elif len(damaged) > config.max_damaged_files:
        problem = (
            f"{len(damaged)} {split} files that were damaged, more than max_damaged_files ="
            f" {config.max_damaged_files}: {damaged[0]['damaged']}; then"
        )
    if problem:
        raise CacheError(
            f"token cache: {directory} lacks {problem} run `fope data build` again, or accept so"
            " many"
        )
    if is_in_bucket(directory):
        directory = download(directory, MANIFEST, file_hashes(manifest))
    return TokenCache(directory, manifest, split)


def _describe_missing(config: DataConfig, directory: Path, fingerprint: str | None) -> str:
    begun = partial_directory(base_directory(config)).exists()
    which = f" with fingerprint {fingerprint}" if fingerprint else ""
    return (
        f"there is no token cache of corpus {config.corpus!r}{which} in {directory}"
        f"{' (it has been begun)' if begun else ''}; build it: {BUILD}"
    )


def _no_text(tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest of a cache without tokens, for runs that train on tasks only."""
    none = {"documents": 0, "bytes": 0, "empty_documents": 0, "changed_documents": 0, "shards": []}
    return {
        "fingerprint": hashlib.sha256(f"no text {tokenizer.fingerprint}".encode()).hexdigest(),
        "tokenizer": tokenizers.describe_tokenizer(tokenizer),
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "block_tokens": BLOCK_TOKENS,
        "shard_tokens": SHARD_TOKENS,
        "splits": dict.fromkeys(SPLITS, none),
    }


def _array_record():
    return require("array_record.python.array_record_module", "train")


@dataclass
class Progress:
    """What the complete shards of a split hold; a build continues from it.

    Attributes:
      documents, tokens: of each corpus, of documents that are complete in the shards, or empty.
      inside: tokens of the next document that the shards hold already.
      bytes: bytes of text of the documents that begin in the shards.
      changed_documents, first_changed: documents whose tokens decode to another text; some names.
      bad: unreadable documents, see `add_bad_document`.
    """

    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    inside: int = 0
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
    """Writes the token stream of one split into shards, document by document.

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
        self._skip = progress.inside  # tokens of the first document that are written already
        self._position = progress.num_tokens  # of the next token
        self._open_shard()

    def add(self, document: TokenizedDocument) -> None:
        """Appends a document. One that is empty or bad is counted and leaves no token."""
        now, size, corpus = self._now, len(document.tokens), document.corpus
        written, self._skip = self._skip, 0
        if document.bytes == 0:
            if document.bad:
                now.bad = add_bad_document(now.bad, document)
            else:
                now.empty_documents += 1
            now.documents[corpus] = now.documents.get(corpus, 0) + 1
            return
        if written == 0:
            self._table.append((document.name, self._position, size, document.bytes))
            now.bytes += document.bytes
            token_bytes = int(self._token_bytes[document.tokens].sum(dtype=np.int64))
            if document.changed or token_bytes - self._prefix_bytes != document.bytes:
                now.changed_documents += 1
                now.first_changed = [*now.first_changed, document.name][:_NAMES_SHOWN]
        tokens = document.tokens.astype(self._dtype)
        while written < size:
            piece = tokens[written : written + self._shard_tokens - self._shard_size]
            self._append(piece)
            written += len(piece)
            if written == size:
                now.documents[corpus] = now.documents.get(corpus, 0) + 1
                now.tokens[corpus] = now.tokens.get(corpus, 0) + size
            if self._shard_size == self._shard_tokens:
                now.inside = written % size
                self._close_shard()
                self._open_shard()
        now.inside = 0

    @property
    def bad(self) -> dict[str, Any]:
        """The unreadable documents so far, see `add_bad_document`."""
        return self._now.bad

    def finish(self) -> Progress:
        """Closes the last shard, whose last block may be shorter."""
        self._now.complete = True
        if self._shard_size:
            self._close_shard()
        else:
            self._writer.close()
            self._scratch.unlink()
            self._save(self._now)
        return self._now

    def _append(self, tokens: np.ndarray) -> None:
        self._pending = np.concatenate([self._pending, tokens])
        self._shard_size += len(tokens)
        self._position += len(tokens)
        whole = len(self._pending) - len(self._pending) % self._block_tokens
        for block in self._pending[:whole].reshape(-1, self._block_tokens):
            self._writer.write(block.tobytes())
        self._pending = self._pending[whole:]

    def _open_shard(self) -> None:
        self._name = f"{self._split}-{len(self._now.shards):05d}"
        self._scratch = self._directory / f"{self._name}.unfinished"
        # One block a chunk, uncompressed: reading a window takes 26 us instead of 90.
        self._writer = _array_record().ArrayRecordWriter(
            str(self._scratch), "group_size:1,uncompressed"
        )
        self._pending, self._shard_size = np.zeros(0, self._dtype), 0
        self._table: list[tuple[str, int, int, int]] = []

    def _close_shard(self) -> None:
        if len(self._pending):
            self._writer.write(self._pending.tobytes())
        self._writer.close()
        shard = self._directory / f"{self._name}.array_record"
        _sync(self._scratch)
        os.replace(self._scratch, shard)
        table = self._directory / f"{self._name}.documents.npz"
        names, start, length, size = zip(*self._table, strict=True) if self._table else [()] * 4
        np.savez(
            table,
            start=np.array(start, np.int64),
            length=np.array(length, np.int64),
            bytes=np.array(size, np.int64),
            names=np.frombuffer(json.dumps(names).encode(), np.uint8),
        )
        _sync(table)
        documents = {"file": table.name, "count": len(self._table), "sha256": file_sha256(table)}
        entry = {"file": shard.name, "tokens": self._shard_size, "sha256": file_sha256(shard)}
        self._now.shards = [*self._now.shards, entry | {"documents": documents}]
        self._save(self._now)


_NAMES_SHOWN = 20


def add_bad_document(bad: dict[str, Any], document: TokenizedDocument) -> dict[str, Any]:
    """Adds an unreadable document to ``bad``: count, digest of all names, first reasons."""
    name = document.name.rpartition("/")[2]  # the digest must not depend on where the files are
    names = f"{bad['digest']} {name}".encode()
    return {
        "count": bad["count"] + 1,
        "digest": hashlib.sha256(names).hexdigest(),
        "first": [*bad["first"], document.bad][:_NAMES_SHOWN],
    }


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every token."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
