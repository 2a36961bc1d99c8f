"""The manifest of a token cache: its files and their hashes, validated before use.

Its digest of itself finds damage that is still valid JSON; older manifests have none. File names
must be plain names, so a manifest cannot point outside the cache directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.config import SPLITS
from fope_jax.storage.content import HEAD_BYTES, detect_content

MANIFEST = "manifest.json"
BUILD = "fope data build --config CONFIG"
REBUILD = "delete the directory and run `fope data build` again"
_DIGEST = "sha256"

# The form of a manifest: fields with a type, a pattern, an object or a list of these. Older caches
# lack the fields that end in "?".
_HEX = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ACCEPTED = {_HEX: "64 hex digits", _FILE: "a name in this directory"}
_TABLE = {"file": _FILE, "count": int, "sha256": _HEX}
_INDEX = {"file": _FILE, "sha256": _HEX}
_SHARD = {"file": _FILE, "tokens": int, "sha256": _HEX, "index?": _INDEX, "documents": _TABLE}
_COUNTS = ("documents", "bytes", "empty_documents", "changed_documents", "bad_documents?")
_SPLIT = {**dict.fromkeys(_COUNTS, int), "first_bad?": list, "first_changed?": list}
_SPLIT["shards"] = [_SHARD]
_FORM = {
    **dict.fromkeys(("fingerprint", "content", "dtype"), str),
    "config": dict,
    "tokenizer": {"kind": str, "vocab_size": int, "fingerprint": str},
    **dict.fromkeys(("block_tokens", "shard_tokens"), int),
    "splits": dict.fromkeys(SPLITS, _SPLIT),
    "sources": [{"corpus": str, "damaged?": str}],
}
_FILE_SOURCE = {"path": str, "size": int, "mtime_ns": int, "split": str}


class StoredManifest(NamedTuple):
    """A manifest: its fields, and the bytes of its file, by which copies of a cache are named."""

    fields: dict[str, Any]
    content: bytes


class CacheError(RuntimeError):
    """A token cache is absent, damaged or cannot be written; the message names the file."""


class MissingCacheError(CacheError):
    """The token cache is not built; `fope` names the command that builds it in place of BUILD."""


def add_digest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its digest added."""
    return {**manifest, _DIGEST: _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The fields of the manifest of a complete cache, or None; errors as of `load_manifest`."""
    stored = load_manifest(directory)
    return stored.fields if stored else None


def load_manifest(directory: Path) -> StoredManifest | None:
    """The manifest of a complete cache, or None; CacheError names the file and the bad field."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(content)
        _check(manifest)
    except (ValueError, RecursionError) as error:
        found = detect_content(content[:HEAD_BYTES])
        what, advice = (f"it is {found.kind}", found.advice) if found else (error, REBUILD)
        raise CacheError(f"token cache: {path} is damaged: {what}; {advice}") from error
    return StoredManifest(manifest, content)


def file_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of every file of the shards, by file name."""
    return {entry["file"]: entry["sha256"] for entry in _files(manifest)}


def shard_files(shard: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries, with ``file`` and ``sha256``, of the files of a shard."""
    return [shard, *([shard["index"]] if "index" in shard else []), shard["documents"]]


def _files(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return [entry for shard in shards for entry in shard_files(shard)]


def _check(manifest: Any) -> None:
    """Raises ValueError with the name of the wrong field."""
    _check_form("", manifest, _FORM)
    if manifest.get(_DIGEST, _digest(manifest)) != _digest(manifest):
        raise ValueError("it is not what was written (sha256)")
    # An unknown name may be that of an optional field or of the digest with a flipped bit.
    unknown = [*(manifest.keys() - {*_FORM, _DIGEST}), *(manifest["splits"].keys() - {*SPLITS})]
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r:.80}")
    for number, source in enumerate(manifest["sources"]):
        if "tfds" not in source:
            of_kind = {"shard": int} if "shard" in source else {"sha256": str}
            _check_form(f"sources[{number}]", source, _FILE_SOURCE | of_kind)
    block, shard, dtype = (manifest[name] for name in ("block_tokens", "shard_tokens", "dtype"))
    _require("block_tokens", block, block >= 1, "1 or more")
    accepted = f"a multiple of block_tokens = {block}"
    _require("shard_tokens", shard, shard >= 1 and shard % block == 0, accepted)
    _require("dtype", dtype, dtype in ("<u2", "<i4"), "'<u2' or '<i4'")
    for split in SPLITS:
        sizes = [entry["tokens"] for entry in manifest["splits"][split]["shards"]]
        for number, size in enumerate(sizes):
            is_last = number == len(sizes) - 1
            fits = 1 <= size <= shard if is_last else size == shard
            name = f"splits.{split}.shards[{number}].tokens"
            _require(name, size, fits, f"{shard}, or fewer in the last shard")
    for file, count in Counter(entry["file"] for entry in _files(manifest)).most_common(1):
        if count > 1:
            raise ValueError(f"file = {file!r} is named twice")


def _check_form(name: str, value: Any, form: Any) -> None:
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name or 'the whole'} is no JSON object")
        for key, inner in form.items():
            field, path = key.rstrip("?"), f"{name}.{key}".strip(".?")
            if field in value:
                _check_form(path, value[field], inner)
            elif field == key:
                raise ValueError(f"{path} is missing")
    elif isinstance(form, list):
        _check_form(name, value, list)
        for number, item in enumerate(value):
            _check_form(f"{name}[{number}]", item, form[0])
    elif isinstance(form, re.Pattern):
        is_match = isinstance(value, str) and bool(form.fullmatch(value))
        _require(name, value, is_match, _ACCEPTED[form])
    else:
        is_of_type = isinstance(value, form) and not isinstance(value, bool)
        _require(name, value, is_of_type, form.__name__)
        _require(name, value, form is not int or value >= 0, "0 or more")


def _require(name: str, value: Any, condition: bool, accepted: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r:.80}; accepted: {accepted}")
