"""Token caches of older versions: shards of ArrayRecord, one record a block of 16,384 tokens.

``train-00000.documents.npz`` held the starts and lengths of documents beside their names, and all
of them are read when the first is asked for. `fope data build` with an empty ``cache_dir`` writes
the same tokens, with the same fingerprint, in the form of `fope_jax.data.cache`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data.cache_reader import TokenCache, check_token_range
from fope_jax.data.manifest import REBUILD, CacheError
from fope_jax.extras import require

_BLOCKS_IN_MEMORY = 2048
_OPEN_SHARDS = 256


class ArrayRecordCache(TokenCache):
    """The sha256 of a shard is checked at its first read, ArrayRecord's checksum at every read."""

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str):
        super().__init__(directory, manifest, split)
        # Bound to the instance: a deleted cache frees its blocks.
        self._read_block = functools.lru_cache(maxsize=_BLOCKS_IN_MEMORY)(self._read_block)
        self._open_reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open_reader)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.ascontiguousarray(self.documents["start"])

    def document_starts(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        check_token_range(start, stop, self.num_tokens, self.split)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        return first, self._starts[first : np.searchsorted(self._starts, stop)]

    def shard_documents(self, number: int) -> np.ndarray:
        return self._read_table(number, ("start", "length", "bytes"))

    def _read_side_file(self, number: int) -> np.ndarray:
        return self.shard_documents(number)

    def _read_pieces(self, pieces: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        return [self._read_tokens(*piece) for piece in pieces]

    def _read_tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        first, last = start // self._block, -(-stop // self._block)
        blocks = [self._read_block(shard, record) for record in range(first, last)]
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[start - first * self._block : stop - first * self._block]

    def _open_reader(self, shard: int) -> Any:
        self._check_hash(self._shards[shard])
        # No read-ahead, no helper threads: windows are shuffled and need one record at a time.
        return require("array_record.python.array_record_module", "train").ArrayRecordReader(
            str(self.directory / self._shards[shard]["file"]),
            "readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2 * self._block,
        )

    def _read_block(self, shard: int, record: int) -> np.ndarray:
        size = min(self._block, self._shards[shard]["tokens"] - record * self._block)
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
