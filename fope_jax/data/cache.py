"""The token cache: the tokenized corpus on disk, written once, read at any position.

A split is one stream of tokens, ``document, EOS, document, EOS, ...``, cut into shards of plain
arrays. Nothing but the manifest is read when a cache is opened, and a window is three short reads.

    CACHE_DIR/gutenberg-sentencepiece4096-1a2b3c4d5e6f-0123456789ab/
        manifest.json               config, sources, and the sha256 of every file below
        tokenizer.model
        train-00000.tokens          [N] uint16, or int32 if V > 65,536, little-endian
        train-00000.index           a `BLOCK_ROW` for each block of 4,096 tokens, then int64: where
                                    documents begin, first the last one of the shards before
        train-00000.documents.npz   names and bytes of the documents that begin in this shard; only
                                    evaluation and `fope data inspect` read it
        validation-00000.tokens ...

A row of the index holds checksums of its block's tokens and document starts, so whatever part of a
shard is read, from a disk or a bucket, is known to be what was written. A cache is opened here,
read by `cache_reader.py`, and written by `cache_writer.py`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fope_jax.data import tokenizers
from fope_jax.data.bucket_shards import BucketShards
from fope_jax.data.cache_directories import base_directory, find_cache, partial_directory
from fope_jax.data.cache_reader import TokenCache, token_dtype
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.manifest import (
    BUILD,
    MANIFEST,
    CacheError,
    MissingCacheError,
    StoredManifest,
    file_hashes,
)
from fope_jax.data.mirror import copy_directory, download
from fope_jax.data.sources import damaged_files
from fope_jax.data.tokenizers import BytesTokenizer, Tokenizer
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.paths import check_bucket, is_in_bucket

BLOCK_TOKENS = 2**12
SHARD_TOKENS = 2**25


def open_cache(config: DataConfig, split: str, fingerprint: str | None = None) -> TokenCache:
    """Opens one split of a cache of ``config``; needs neither TensorFlow nor text.

    A cache in a bucket is read from there by range; with ``config.copy_shards`` the shards that
    are used are copied to this machine meanwhile, once for all processes and later runs.

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
    directory, stored = find_cache(config, fingerprint)
    if stored is None:
        raise MissingCacheError(_describe_missing(config, directory, fingerprint))
    manifest = stored.fields
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
        return _open_in_bucket(directory, stored, split, config.copy_shards)
    return make_cache(directory, manifest, split)


def make_cache(directory: Path, manifest: dict[str, Any], split: str) -> TokenCache:
    """The split of a manifest; shards without an index are ArrayRecord files of older versions."""
    if _is_array_record(manifest):
        from fope_jax.data.array_record_cache import ArrayRecordCache

        return ArrayRecordCache(directory, manifest, split)
    return TokenCache(directory, manifest, split)


def _is_array_record(manifest: dict[str, Any]) -> bool:
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return any("index" not in shard for shard in shards)


def _open_in_bucket(
    remote: Path, stored: StoredManifest, split: str, copy_shards: bool
) -> TokenCache:
    """Reads the shards as they are needed; those of older versions are copied whole, and first."""
    manifest, content = stored
    hashes = file_hashes(manifest)
    whole = copy_directory(remote, content, hashes)
    if _is_array_record(manifest) or whole.is_dir():
        return make_cache(download(remote, MANIFEST, content, hashes), manifest, split)
    bucket = BucketShards(remote, whole.with_name(whole.name + ".shards"), hashes, copy_shards)
    cache = TokenCache(bucket.directory, manifest, split, bucket)
    bucket.fetch(list_file_sizes(remote).keys() - {MANIFEST, *hashes})  # of the tokenizer
    return cache


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
