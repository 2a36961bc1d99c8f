"""The index of a token cache: what its files are, checked before anything is believed of it.

A manifest holds a digest of itself, so that damage is found that leaves it valid JSON; those
written before there was one are checked for their form alone. File names in it are names within
the cache's directory, whatever a stranger's manifest says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fope_jax.data.config import SPLITS
from fope_jax.storage.content import HEAD_BYTES, detect_content

MANIFEST = "manifest.json"
REBUILD = "delete the directory and run `fope data build` again"
_DIGEST = "sha256"
_HEX = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_FIELDS = {
    "fingerprint": str,
    "content": str,
    "config": dict,
    "tokenizer": dict,
    "dtype": str,
    "block_tokens": int,
    "shard_tokens": int,
    "splits": dict,
    "sources": list,
}
_SPLIT = {
    "documents": int,
    "bytes": int,
    "empty_documents": int,
    "changed_documents": int,
    "shards": list,
}
_LATER = {"bad_documents": int, "first_bad": list, "first_changed": list}  # not in older caches
_SHARD = {"file": str, "tokens": int, "sha256": str, "documents": dict}
_TABLE = {"file": str, "count": int, "sha256": str}
_TOKENIZER = {"kind": str, "vocab_size": int, "fingerprint": str}
_SOURCE = {"corpus": str}
_FILE_SOURCE = {"path": str, "size": int, "mtime_ns": int, "split": str}
_TEXT = {**_FILE_SOURCE, "sha256": str}
_TFDS_FILE = {**_FILE_SOURCE, "shard": int}


class CacheError(RuntimeError):
    """A token cache that is absent, damaged or cannot be written; the message names the file."""


class _Problem(Exception):
    """What is wrong with a manifest, and where in it."""


def add_digest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest."""
    return {**manifest, _DIGEST: _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete cache, None where there is none.

    Raises:
      CacheError: it is cut off, has changed since it was written, or is none; the message names
        file and field.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(content)
        _check(manifest)
    except (ValueError, RecursionError, _Problem) as error:
        found = detect_content(content[:HEAD_BYTES])
        what, advice = (f"it is {found.kind}", found.advice) if found else (error, REBUILD)
        raise CacheError(f"token cache: {path} is damaged: {what}; {advice}") from error
    return manifest


def file_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of every shard and table, by file name."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files = [*shards, *(shard["documents"] for shard in shards)]
    return {entry["file"]: entry["sha256"] for entry in files}


# ---------------------------------------------------------------------------- checks


def _check(manifest: Any) -> None:
    _fields("", manifest, _FIELDS)
    if manifest.get(_DIGEST, _digest(manifest)) != _digest(manifest):
        raise _Problem("it is not what was written (sha256)")
    # A name that is not known may be that of a field, or of the digest, with a flipped bit.
    unknown = sorted(manifest.keys() - _FIELDS.keys() - {_DIGEST})
    if unknown:
        raise _Problem(f"unknown field {unknown[0]!r:.80}")
    _fields("tokenizer.", manifest["tokenizer"], _TOKENIZER)
    block, shard = manifest["block_tokens"], manifest["shard_tokens"]
    _require("block_tokens", block, block >= 1, "1 or more")
    accepted = f"a multiple of block_tokens = {block}"
    _require("shard_tokens", shard, shard >= 1 and shard % block == 0, accepted)
    _require("dtype", manifest["dtype"], manifest["dtype"] in ("<u2", "<i4"), "'<u2' or '<i4'")
    found = tuple(manifest["splits"])
    _require("splits", found, sorted(found) == sorted(SPLITS), f"{SPLITS}")
    for name in SPLITS:
        _check_split(f"splits.{name}.", manifest["splits"][name], shard)
    for number, source in enumerate(manifest["sources"]):
        where = f"sources[{number}]."
        _fields(where, source, _SOURCE)
        kind = {} if "tfds" in source else _TFDS_FILE if "shard" in source else _TEXT
        _fields(where, source, kind)
        _fields(where, source, {"damaged": str} if "damaged" in source else {})
    files = [entry for name in SPLITS for entry in _files(manifest["splits"][name])]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise _Problem(f"file = {twice!r} is named twice")


def _check_split(where: str, split: Any, shard_tokens: int) -> None:
    _fields(where, split, _SPLIT)
    _fields(where, split, {name: kind for name, kind in _LATER.items() if name in split})
    for number, shard in enumerate(split["shards"]):
        own = f"{where}shards[{number}]."
        _fields(own, shard, _SHARD)
        _fields(f"{own}documents.", shard["documents"], _TABLE)
        for entry in (shard, shard["documents"]):
            file, digest = entry["file"], entry["sha256"]
            _require(f"{own}file", file, bool(_FILE.fullmatch(file)), "a name in this directory")
            _require(f"{own}sha256", digest, bool(_HEX.fullmatch(digest)), "64 hex digits")
        tokens, last = shard["tokens"], number == len(split["shards"]) - 1
        full = 1 <= tokens <= shard_tokens if last else tokens == shard_tokens
        _require(f"{own}tokens", tokens, full, f"{shard_tokens}, or fewer in the last shard")


def _files(split: Mapping[str, Any]) -> list[str]:
    return [file for s in split["shards"] for file in (s["file"], s["documents"]["file"])]


def _fields(where: str, values: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(values, dict):
        raise _Problem(f"{where.rstrip('.') or 'the whole'} is no JSON object")
    for name, kind in kinds.items():
        if name not in values:
            raise _Problem(f"{where}{name} is missing")
        value = values[name]
        of_kind = isinstance(value, kind) and not isinstance(value, bool)
        _require(f"{where}{name}", value, of_kind, kind.__name__)
        _require(f"{where}{name}", value, kind is not int or value >= 0, "0 or more")


def _require(name: str, value: Any, condition: bool, accepted: str) -> None:
    if not condition:
        raise _Problem(f"{name} = {value!r:.80}; accepted: {accepted}")
