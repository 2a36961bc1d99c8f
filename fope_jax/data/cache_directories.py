"""Which directory holds the token cache of a configuration.

A cache is never overwritten: its directory is named by the configuration and by its content, and
changed text is built into another directory, so that finished runs keep the tokens they read. Of a
tokenizer.json the name has the path; where none is built by that name, a cache of the same text and
an equal file counts.

    CACHE_DIR/text-bytes-1a2b3c4d5e6f-0123456789ab/     digest of the configuration, fingerprint
    CACHE_DIR/text-bytes-1a2b3c4d5e6f.current.json      which of them was built last
    CACHE_DIR/text-bytes-1a2b3c4d5e6f/                  of an older version, which overwrote it
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.manifest import CacheError, StoredManifest, load_manifest, read_manifest
from fope_jax.data.tokenizers import JsonTokenizer
from fope_jax.storage.directories import list_file_sizes
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import as_path, is_in_bucket, path_within

FORMAT = 1  # of the stored tokens
_DIGITS = 12


def base_directory(config: DataConfig) -> Path:
    """The path that the directories of all caches of ``config`` begin with."""
    identity = json.dumps(cache_identity(config), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    size = str(config.vocab_size) if config.tokenizer == "sentencepiece" else ""
    label = Path(config.tokenizer + size).stem
    return as_path(config.cache_dir) / f"{config.corpus}-{label}-{digest[:_DIGITS]}"


def cache_identity(config: DataConfig) -> dict[str, Any]:
    """The fields of ``config`` that decide the tokens; packing and training length do not."""
    corpora = [name for name, _ in config.components]
    fields = {"components": [list(part) for part in config.components]}
    names = ["tokenizer"]
    if "gutenberg" in corpora:
        names += ["validation_books", "excluded_books"]
    if "c4" in corpora and config.tfds_data_dir:
        names += ["tfds_name", "tfds_data_dir"]
    if config.train_files:
        names += ["train_files", "validation_files"]
        names += ["text_field"] if config.text_field != "text" else []
    if config.tokenizer == "sentencepiece":
        names += ["vocab_size"]
    names += [name for name in ("max_tokens", "max_documents") if getattr(config, name)]
    for name in names:
        value = getattr(config, name)
        fields[name] = sorted(value) if isinstance(value, tuple) else value
    return fields | {"format": FORMAT}


def cache_directory(config: DataConfig) -> Path:
    """The directory of the cache of ``config`` that was built last.

    Where there is none, the path does not exist. CacheError if a manifest or the file that names
    the last one is damaged, or if nothing says which of several caches was built last.
    """
    return _locate(config, None)[0]


def find_cache(
    config: DataConfig, fingerprint: str | None = None
) -> tuple[Path, StoredManifest | None]:
    """`cache_directory` and the manifest there, which is read once; None where no cache is built.

    CacheError as of `cache_directory`, and if the manifest is damaged.
    """
    directory, manifest = _locate(config, fingerprint)
    return directory, manifest or load_manifest(directory)


def _locate(config: DataConfig, fingerprint: str | None) -> tuple[Path, StoredManifest | None]:
    """The directory of a cache, and its manifest where that had to be read to find it."""
    base = base_directory(config)
    if fingerprint is not None:
        return _find_fingerprint(base, fingerprint)
    pointer = _pointer(base)
    if pointer.is_file():
        try:
            return path_within(base.parent, read_json(pointer)["directory"]), None
        except (ValueError, KeyError) as error:
            raise CacheError(
                f"token cache: {pointer} is damaged: {error}; run `fope data build` again"
            ) from error
    if is_in_bucket(base):
        return base, None
    if manifest := load_manifest(base):
        return base, manifest
    found = list(_built_beside(base)) or list(_built_with_equal_tokenizer(config))
    if len(found) > 1:
        raise CacheError(
            f"token cache: {pointer} is missing, and without it nothing says which of these was "
            f"built last: {', '.join(path.name for path in found)}; run `fope data build` again"
        )
    return found[0] if found else base, None


def content_directory(base: Path, fingerprint: str) -> Path:
    """The directory that a cache of that fingerprint is built into."""
    return base.with_name(f"{base.name}-{fingerprint[:_DIGITS]}")


def built_directories(config: DataConfig) -> list[Path]:
    """The complete caches of ``config``, the one built last first."""
    base = base_directory(config)
    candidates = [base]
    if not is_in_bucket(base):
        candidates += [*_built_beside(base), *_built_with_equal_tokenizer(config)]
    with contextlib.suppress(CacheError):
        candidates.insert(0, cache_directory(config))
    return [path for path in dict.fromkeys(candidates) if _is_built(path)]


def set_current(config: DataConfig, directory: Path) -> None:
    """Records ``directory`` as the cache of ``config`` that was built last."""
    base = base_directory(config)
    with contextlib.suppress(CacheError):
        is_named = _pointer(base).is_file() or directory == base
        if is_named and cache_directory(config) == directory:
            return
    write_json(_pointer(base), {"directory": directory.name})


def partial_directory(directory: Path) -> Path:
    """Where a cache is while it is being built."""
    return directory.with_name(directory.name + ".partial")


class CacheEntry(NamedTuple):
    """A token cache on disk; ``is_current`` if training with its configuration would read it."""

    directory: Path
    fingerprint: str
    size: int
    tokens: int
    is_current: bool


def list_caches(cache_dir: Path) -> list[CacheEntry]:
    """The complete caches in a local directory, by name."""
    current = set()
    for pointer in cache_dir.glob("*.current.json"):
        with contextlib.suppress(ValueError, KeyError):
            current.add(read_json(pointer)["directory"])
    pointed = {path.name.removesuffix(".current.json") for path in cache_dir.glob("*.current.json")}
    entries = []
    for path in sorted(cache_dir.glob("*/manifest.json")):
        directory = path.parent
        with contextlib.suppress(CacheError):
            manifest = read_manifest(directory) or {}
            shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
            entries.append(
                CacheEntry(
                    directory,
                    manifest["fingerprint"],
                    sum(list_file_sizes(directory).values()),
                    sum(shard["tokens"] for shard in shards),
                    directory.name in current or not _configuration(directory.name) & pointed,
                )
            )
    return entries


def _configuration(name: str) -> set[str]:
    """What a directory may be called without its fingerprint."""
    return {name, name[: -_DIGITS - 1]}


def _pointer(base: Path) -> Path:
    return base.with_name(base.name + ".current.json")


def _find_fingerprint(base: Path, fingerprint: str) -> tuple[Path, StoredManifest | None]:
    """A cache of that fingerprint, whatever configuration it was built for; None: there is none."""
    expected = content_directory(base, fingerprint)
    for directory in itertools.chain((expected, base), _named_by(base.parent, fingerprint)):
        with contextlib.suppress(CacheError):
            manifest = load_manifest(directory)
            if manifest and manifest.fields["fingerprint"] == fingerprint:
                return directory, manifest
    return expected, None


def _named_by(parent: Path, fingerprint: str) -> Iterator[Path]:
    """The directories that are named by that fingerprint, in a bucket by one listing."""
    end = f"-{fingerprint[:_DIGITS]}"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # no cache was built there
        yield from sorted(path for path in parent.iterdir() if path.name.endswith(end))


def _built_beside(base: Path) -> Iterator[Path]:
    """Complete caches of the same configuration, by name."""
    yield from filter(_is_built, sorted(base.parent.glob(f"{base.name}-{'[0-9a-f]' * _DIGITS}")))


def _built_with_equal_tokenizer(config: DataConfig) -> Iterator[Path]:
    """Complete caches of the same configuration but for the path of an equal tokenizer.json.

    A directory is named by the path; the file may have been moved or copied, with its run.
    """
    path = as_path(config.tokenizer)
    if not config.tokenizer.endswith(".json") or is_in_bucket(path) or not path.is_file():
        return
    identity = cache_identity(config) | {"tokenizer": ""}
    names, tokenizer = set(), None
    for pointer in sorted(as_path(config.cache_dir).glob("*.current.json")):
        with contextlib.suppress(CacheError, ValueError, KeyError, OSError):
            directory = path_within(pointer.parent, read_json(pointer)["directory"])
            manifest = read_manifest(directory)
            if not manifest or manifest["config"] | {"tokenizer": ""} != identity:
                continue
            tokenizer = tokenizer or JsonTokenizer.load(path)
            if manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint:
                names.add(directory.name)
    yield from (as_path(config.cache_dir) / name for name in sorted(names))


def _is_built(directory: Path) -> bool:
    try:
        return read_manifest(directory) is not None
    except CacheError:
        return False
