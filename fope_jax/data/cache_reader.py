"""Reads one split of a token cache at any position; the form of its files: `fope_jax.data.cache`.

A window is three short reads: rows of the index, with the checksums of the blocks, then tokens and
document starts. Whatever is read is checked against them.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data import tokenizers
from fope_jax.data.bucket_shards import BucketShards, Range
from fope_jax.data.local_files import LocalFiles
from fope_jax.data.manifest import REBUILD, CacheError, shard_files
from fope_jax.data.mirror import MirrorError
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.storage.content import GIT_LFS_POINTER, detect_content, read_head
from fope_jax.storage.directories import PARALLEL_TRANSFERS, list_file_sizes
from fope_jax.storage.files import file_sha256

DOCUMENT_DTYPE = np.dtype(
    [("name", object), ("start", np.int64), ("length", np.int64), ("bytes", np.int64)]
)
_NO_TOKENS = np.zeros(0, np.int32)
BLOCK_ROW = np.dtype(
    [("tokens_crc", "<u4"), ("starts_crc", "<u4"), ("first_start", "<u4"), ("num_starts", "<u4")]
)


class TokenCache:
    """One split of a token cache; ``num_tokens`` counts one EOS per document.

    Any number of threads may read it. What is read is checked each time (crc32 of blocks).

    Args:
      bucket: reads the files, where they are in a bucket; ``directory`` is that of its copies.

    Attributes:
      directory: of the files, or of their copies on this machine.
      location: where the cache is: a directory, or a bucket's.
      fingerprint: hex digest of text, tokenizer and splits.
      summary: counts of the build, see `fope_jax.data.cache_writer.Progress`.
      sources: the text files of both splits.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        split: str,
        bucket: BucketShards | None = None,
    ):
        self.directory, self.split, self._bucket = directory, split, bucket
        self.location = bucket.remote if bucket else directory
        self._files = LocalFiles(directory)
        self.fingerprint: str = manifest["fingerprint"]
        self._tokenizer_description = manifest["tokenizer"]
        self._dtype = np.dtype(manifest["dtype"])
        self._block, self._shard_tokens = manifest["block_tokens"], manifest["shard_tokens"]
        self.summary: dict[str, Any] = manifest["splits"][split]
        self.sources: list[dict[str, Any]] = manifest.get("sources", [])
        self._shards: list[dict[str, Any]] = self.summary["shards"]
        self.num_tokens: int = sum(shard["tokens"] for shard in self._shards)
        counts = [shard["documents"]["count"] for shard in self._shards]
        # Documents that begin before each shard, and all of them.
        self._documents_before: list[int] = np.cumsum([0, *counts]).tolist()
        self._check_present()

    @property
    def num_documents(self) -> int:
        """Documents with text."""
        return self._documents_before[-1]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``[start, stop)``, int32. IndexError: out of range. CacheError: damaged shard."""
        return self.read_many([(start, stop)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """`tokens` of several ranges, which are asked of a bucket together."""
        pieces, ends = [], []
        for start, stop in ranges:
            check_token_range(start, stop, self.num_tokens, self.split)
            pieces += self._pieces(start, stop)
            ends.append(len(pieces))
        parts = [part.astype(np.int32) for part in self._read_pieces(pieces)]
        return [
            parts[begin] if end - begin == 1 else np.concatenate([_NO_TOKENS, *parts[begin:end]])
            for begin, end in itertools.pairwise([0, *ends])
        ]

    def document_starts(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Where the documents of tokens ``[start, stop)`` begin, and the number of the first.

        Returns the number, from 0, of the document that token ``start`` is in, and ``[n]`` int64:
        the first token of that document and of each that begins in ``(start, stop)``. Errors as of
        `tokens`; IndexError also if no token is asked for.
        """
        check_token_range(start, stop, self.num_tokens, self.split)
        if start == stop:
            raise IndexError(f"document_starts({start}, {stop}); accepted: at least one token")
        found = [self._read_starts(*piece) for piece in self._pieces(start, stop)]
        starts = found[0][1]
        if len(found) > 1:  # a document that goes on in the next shard is listed there too
            starts = np.unique(np.concatenate([starts for _, starts in found]))
        skipped = int(np.searchsorted(starts, start, side="right")) - 1
        return found[0][0] + skipped, starts[skipped : np.searchsorted(starts, stop)]

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """``[D]`` with fields name, start, length (tokens, EOS included) and bytes (of text).

        Takes memory for every document: for validation splits, not for corpora to train on.
        """
        tables = [self.shard_documents(number) for number in range(self.num_shards)]
        return np.concatenate([np.zeros(0, DOCUMENT_DTYPE), *tables])

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_documents(self, number: int) -> np.ndarray:
        """The rows of ``documents`` of the documents that begin in a shard, from 0."""
        begin = number * self._shard_tokens
        end = begin + self._shards[number]["tokens"]
        table = self._read_side_file(number)
        if len(table):
            table["start"] = self.document_starts(begin, end)[1][-len(table) :]
            table["length"] = np.diff(table["start"], append=self._end_of_document(end))
        return table

    def document_name(self, number: int) -> str:
        """The name of one document; reads the names of a shard."""
        shard = bisect.bisect_right(self._documents_before, number) - 1
        return str(self._read_side_file(shard)["name"][number - self._documents_before[shard]])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the cache was written with."""
        return tokenizers.load_tokenizer(self.directory, self._tokenizer_description)

    def verify(self) -> None:
        """Reads every file of the split; raises CacheError with the name of a damaged one."""
        entries = [entry for shard in self._shards for entry in shard_files(shard)]
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            for _ in pool.map(self._check_hash, entries):
                pass  # raises the first exception

    # ------------------------------------------------------------------ shards

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of the parts of ``[start, stop)``, counted within their shards."""
        for shard in range(start // self._shard_tokens, -(-stop // self._shard_tokens)):
            begin = shard * self._shard_tokens
            yield shard, max(start - begin, 0), min(stop - begin, self._shard_tokens)

    def _read_pieces(self, pieces: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Tokens of parts of shards; whole blocks are read, as their checksums need them."""
        size, block = self._dtype.itemsize, self._block
        rows, parts = self._read_rows(pieces), []
        for (shard, start, _), blocks in zip(pieces, rows, strict=True):
            begin = start // block * block
            end = min(begin + len(blocks) * block, self._shards[shard]["tokens"])
            parts.append((shard, self._shards[shard]["file"], begin * size, end * size))
        tokens = []
        for piece, blocks, data in zip(pieces, rows, self._read_ranges(parts), strict=True):
            shard, start, stop = piece
            first = start // block
            for number, (expected, *_) in enumerate(blocks):
                at = number * block * size
                part = data if len(blocks) == 1 else data[at : at + block * size]
                if zlib.crc32(part) != expected:
                    raise self._damage(shard, f"in block {first + number}")
            begin = first * block
            tokens.append(np.frombuffer(data, self._dtype)[start - begin : stop - begin])
        return tokens

    def _read_starts(self, shard: int, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The number of a document, and the starts from it to the end of a block past ``stop``."""
        entry, blocks = self._shards[shard], self._read_rows([(shard, start, stop)])[0]
        first, lowest = start // self._block, blocks[0][2]
        count = blocks[-1][2] + blocks[-1][3] - lowest
        if not 0 <= lowest < lowest + count <= entry["documents"]["count"] + 1:
            raise self._damage(shard, f"in the index of block {first}")
        begin = _num_blocks(entry["tokens"], self._block) * BLOCK_ROW.itemsize + 8 * lowest
        part = (shard, entry["index"]["file"], begin, begin + 8 * count)
        data = self._read_ranges([part])[0]
        for number, (_, expected, first_start, num_starts) in enumerate(blocks):
            begin = 8 * (first_start - lowest)
            if zlib.crc32(data[begin : begin + 8 * num_starts]) != expected:
                raise self._damage(shard, f"in the index of block {first + number}")
        return self._documents_before[shard] + lowest - 1, np.frombuffer(data, "<i8")

    def _read_rows(
        self, pieces: Sequence[tuple[int, int, int]]
    ) -> list[list[tuple[int, int, int, int]]]:
        """Of each part of a shard the rows of the index, as of `BLOCK_ROW`, of its blocks."""
        size, block, parts = BLOCK_ROW.itemsize, self._block, []
        for shard, start, stop in pieces:
            begin, end = start // block * size, _num_blocks(stop, block) * size
            parts.append((shard, self._shards[shard]["index"]["file"], begin, end))
        self._fetch({file for _, file, _, _ in parts})
        return [list(struct.iter_unpack("<4I", data)) for data in self._read_ranges(parts)]

    def _read_ranges(self, parts: Sequence[tuple[int, str, int, int]]) -> list[bytes]:
        """Bytes ``[begin, end)`` of files, given as (shard, file, begin, end)."""
        if self._bucket:
            ranges = [Range(*part[1:]) for part in parts]
            found = self._from_bucket(self._bucket.read, ranges)
        else:
            found = [self._read_local(*part[1:]) for part in parts]
        for (shard, _, begin, end), data in zip(parts, found, strict=True):
            if len(data) != end - begin:
                raise self._damage(shard, f"it ends after {begin + len(data)} bytes")
        return found

    def _read_local(self, file: str, begin: int, end: int) -> bytes:
        try:
            return self._files.read(file, begin, end)
        except FileNotFoundError:
            raise self._missing(file) from None
        except OSError as error:
            path = self.directory / file
            raise CacheError(f"token cache: {path} cannot be read: {error}") from error

    def _fetch(self, files: Iterable[str]) -> None:
        """Copies whole files from a bucket, unless they are here."""
        if self._bucket:
            self._from_bucket(self._bucket.fetch, files)

    def _from_bucket(self, call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except (MirrorError, FileNotFoundError) as error:
            raise CacheError(f"token cache: {error}; {REBUILD}") from error

    def _end_of_document(self, end: int) -> int:
        """The first token at ``end`` or later that begins a document, or the end of the stream."""
        while end < self.num_tokens:
            stop = min(end + self._block, self.num_tokens)
            starts = self.document_starts(end, stop)[1]
            if len(starts := starts[starts >= end]):
                return int(starts[0])
            end = stop
        return end

    def _read_side_file(self, number: int) -> np.ndarray:
        """``documents`` of a shard with names and bytes; their starts and lengths are zero."""
        return self._read_table(number, ("bytes",))

    def _read_table(self, number: int, columns: tuple[str, ...]) -> np.ndarray:
        """The names and these columns of a shard's side file; the others are zero."""
        entry = self._shards[number]["documents"]
        self._fetch([entry["file"]])
        self._check_hash(entry)
        path = self.directory / entry["file"]
        table = np.zeros(entry["count"], DOCUMENT_DTYPE)
        try:
            with np.load(path, allow_pickle=False) as stored:
                for column in columns:
                    table[column] = stored[column]
                table["name"] = json.loads(stored["names"].tobytes())
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise CacheError(
                f"token cache: {path} is no table of documents: {error}; {REBUILD}"
            ) from error
        return table

    # ------------------------------------------------------------------ damage

    def _check_present(self) -> None:
        if not self._shards:
            return
        files = [entry["file"] for shard in self._shards for entry in shard_files(shard)]
        is_there = self._bucket is not None or self.directory.is_dir()
        present = list_file_sizes(self.location) if is_there else ()
        for file in files:
            if file not in present:
                raise self._missing(file)

    def _path(self, file: str) -> Path:
        """The file, or its copy on this machine where there is one."""
        path = self.directory / file
        return path if self._bucket is None or path.exists() else self.location / file

    def _missing(self, file: str) -> CacheError:
        return CacheError(f"token cache: {self.location / file} is missing; {REBUILD}")

    def _check_hash(self, entry: Mapping[str, Any]) -> None:
        path, expected = self._path(entry["file"]), entry["sha256"]
        try:
            actual = file_sha256(path)
        except FileNotFoundError:
            raise self._missing(entry["file"]) from None
        if actual != expected:
            what, advice = "", self._advice(path)
            if detect_content(read_head(path)) == GIT_LFS_POINTER:
                what, advice = f"it is {GIT_LFS_POINTER.kind}; ", GIT_LFS_POINTER.advice
            raise CacheError(
                f"token cache: {path} is damaged: {what}sha256 {actual[:16]}...,"
                f" expected {expected[:16]}...; {advice}"
            )

    def _advice(self, path: Path) -> str:
        is_copy = self._bucket is not None and path.parent == self.directory
        return f"delete it: it is copied from {self.location} again" if is_copy else REBUILD

    def _damage(self, shard: int, where: str) -> CacheError:
        """The error for a shard of which a part is wrong; names the file whose sha256 is."""
        try:
            for entry in shard_files(self._shards[shard]):
                self._check_hash(entry)
        except CacheError as error:
            message, _, advice = str(error).rpartition("; ")
            return CacheError(f"{message}, {where}; {advice}")
        path = self._path(self._shards[shard]["file"])
        return CacheError(f"token cache: {path} is damaged {where}; {self._advice(path)}")


def _num_blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def check_token_range(start: int, stop: int, num_tokens: int, split: str) -> None:
    """Raises IndexError unless ``[start, stop)`` is within ``[0, num_tokens]``."""
    if not 0 <= start <= stop <= num_tokens:
        raise IndexError(f"tokens [{start}, {stop}) of {split}; accepted: within [0, {num_tokens}]")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every token."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")
