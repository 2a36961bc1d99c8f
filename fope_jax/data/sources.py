"""The text files of a cache: hashes, damage, copies."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import (
    CorpusError,
    corpus_files,
    examine_text_file,
    find_pieces,
    has_text_suffix,
)
from fope_jax.data.tokenizers import JsonTokenizer
from fope_jax.extras import require
from fope_jax.logs import is_quiet
from fope_jax.storage.directories import PARALLEL_TRANSFERS
from fope_jax.storage.files import file_sha256, size_and_mtime
from fope_jax.storage.paths import as_path

Source = dict[str, Any]

_SHOWN = 3
_DAMAGED_SHOWN = 20


def list_sources(config: DataConfig, known: Sequence[Source] = ()) -> list[Source]:
    """Each text file with its sha256, or the identity of a TFDS dataset.

    Several files are looked through at a time; .gz, Parquet and TFRecord files to their end, but
    TFRecord files of which only a part is built are looked through when they are read.
    "damaged" says why a file is unreadable or holds another content; "marked" whether it begins
    with a byte order mark; "pieces", of a large file, where it is cut for several processes.
    Results in ``known`` are reused for files of the same size and modification time.

    Raises:
      CorpusError: a file is missing, or unreadable for another reason than damage.
    """
    cached = {(s.get("path"), s.get("size"), s.get("mtime_ns")): s for s in known}
    sources: list[Source] = []
    looks: list[Callable[[], Source]] = []
    if config.tokenizer not in ("bytes", "sentencepiece"):
        path = as_path(config.tokenizer)
        if not path.is_file():
            JsonTokenizer.load(path)  # raises the error for a missing file
        sources.append(_file_source(config, path, "tokenizer", "", cached))
    for corpus, _ in config.components:
        if corpus == "c4" and config.tfds_data_dir:
            # Imported here: TensorFlow takes seconds.
            from fope_jax.data import tfds_files

            sources.append({"corpus": "c4", "tfds": tfds_files.dataset_identity(config)})
            for split in SPLITS:
                later = tfds_files.is_checked_when_read(config, split)
                for file in tfds_files.list_files(config, split):
                    looks.append(functools.partial(_tfds_source, file, split, cached, later))
            continue
        for split in SPLITS:
            for path in corpus_files(config, corpus, split):
                looks.append(functools.partial(_file_source, config, path, corpus, split, cached))
    return sources + _call_together(looks)


def _call_together(looks: Sequence[Callable[[], Source]]) -> list[Source]:
    """The results in order; several threads, which hashing, unpacking and buckets let run."""
    tqdm = require("tqdm", "train").tqdm
    with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
        results = pool.map(lambda look: look(), looks)
        bar = {"desc": "look through files", "unit": " files", "delay": 2, "leave": False}
        try:
            return list(tqdm(results, total=len(looks), disable=is_quiet(), **bar))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _file_source(
    config: DataConfig, path: Path, corpus: str, split: str, cached: Mapping[Any, Source]
) -> Source:
    try:
        source, earlier = _cached_source(str(path), size_and_mtime(path), cached)
        digest = earlier.get("sha256") or file_sha256(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    source |= {"corpus": corpus, "split": split, "sha256": digest}
    if split and has_text_suffix(path):
        if config.text_field != "text":
            source["field"] = config.text_field
        if "damaged" in earlier and "marked" in earlier:
            source |= {"damaged": earlier["damaged"], "marked": earlier["marked"]}
        else:
            source["damaged"], source["marked"] = examine_text_file(path, config.text_field)
        if pieces := earlier.get("pieces") or _pieces(source, path, config.text_field):
            source["pieces"] = pieces
    return source


def _pieces(source: Source, path: Path, field: str) -> list[list[int | None]]:
    """Where a large file is cut, see `fope_jax.data.corpora.Piece`; nothing for others."""
    if source["damaged"]:
        return []
    pieces = find_pieces(path, source["size"], field)
    return [list(piece) for piece in pieces] if len(pieces) > 1 else []


def _tfds_source(
    file: Any, split: str, cached: Mapping[Any, Source], is_checked_later: bool
) -> Source:
    from fope_jax.data import tfds_files

    source, earlier = _cached_source(file.path, tfds_files.size_and_mtime(file), cached)
    source |= {"corpus": "c4", "split": split, "shard": file.shard}
    if "damaged" in earlier:
        return source | {"damaged": earlier["damaged"]}
    return source if is_checked_later else source | {"damaged": tfds_files.find_damage(file)}


def _cached_source(
    path: str, size_and_mtime: tuple[int, int], cached: Mapping[Any, Source]
) -> tuple[Source, Source]:
    """Path, size and modification time of a file, and its earlier result or {}."""
    size, changed = size_and_mtime
    source = {"path": path, "size": size, "mtime_ns": changed}
    return source, cached.get((path, size, changed), {})


def content_digest(sources: Sequence[Source]) -> str:
    """A hex digest of the text, the same wherever the files are."""
    parts = [
        [s["corpus"], s.get("split"), s.get("sha256"), s.get("tfds")]
        for s in sources
        if "sha256" in s or "tfds" in s
    ]
    # Left-out files change the tokens, and TFDS files are not hashed.
    parts += [
        ["damaged", s["split"], s.get("shard", s.get("sha256"))]
        for s in sources
        if s.get("damaged")
    ]
    # Older caches counted the byte order mark as text: their text differs.
    parts += [["marked", s["split"], s["sha256"]] for s in sources if s.get("marked")]
    parts += [["field", s["split"], s["sha256"], s["field"]] for s in sources if "field" in s]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cut_digest(sources: Sequence[Source]) -> str:
    """`content_digest` and where large files are cut: what a build that goes on depends on."""
    pieces = [source["pieces"] for source in sources if "pieces" in source]
    content = content_digest(sources)
    if not pieces:
        return content
    return hashlib.sha256(json.dumps([content, pieces]).encode()).hexdigest()


def damaged_files(sources: Iterable[Source], split: str) -> list[Source]:
    """The damaged files of a split, which a build leaves out."""
    return [s for s in sources if s.get("split") == split and s.get("damaged")]


def check_damage(sources: Sequence[Source], config: DataConfig) -> None:
    """Raises CorpusError if a split has more damaged files than allowed."""
    for split in SPLITS:
        damaged = damaged_files(sources, split)
        if len(damaged) > config.max_damaged_files:
            shown = [source["damaged"] for source in damaged[:_DAMAGED_SHOWN]]
            raise CorpusError(
                f"damaged files of the {split} split: {len(damaged)}, more than"
                f" max_damaged_files = {config.max_damaged_files}\n  " + "\n  ".join(shown)
            )


def is_unchanged(manifest: Mapping[str, Any], sources: Sequence[Source]) -> bool:
    """Whether a complete cache is of this text; a file damaged after the build does not matter."""

    def key(source: Source) -> tuple[Any, ...]:
        return source["corpus"], source.get("split"), source.get("shard", source.get("path"))

    built = {key(source): source for source in manifest["sources"]}
    as_built = []
    for source in sources:
        earlier = built.get(key(source), {})
        is_newly_damaged = source.get("damaged") and not earlier.get("damaged")
        as_built.append(source | earlier | {"damaged": ""} if is_newly_damaged else source)
    return manifest["content"] == content_digest(as_built)


def check_held_out(sources: Iterable[Source]) -> None:
    """Raises CorpusError if a training file and a held-out file have the same content."""
    sources = list(sources)
    train = {s["sha256"]: s["path"] for s in reversed(_readable_texts(sources, "train"))}
    for source in _readable_texts(sources, "validation"):
        path, same = source["path"], train.get(source["sha256"], source["path"])
        if same != path:  # the books of both splits are one file
            raise CorpusError(
                f"validation file {path} has the same content as training file {same}:"
                " what a model was trained on says nothing about it; take one of them out"
            )


def source_warnings(sources: Sequence[Source], split: str) -> list[str]:
    """Lines about damaged files, empty files, and copies, which stay: they may be intended."""
    damaged = [source["damaged"] for source in damaged_files(sources, split)]
    empty = [
        source["path"]
        for source in sources
        if source.get("split") == split and source.get("size") == 0 and not source.get("damaged")
    ]
    originals: dict[str, str] = {}
    copies = []
    for source in _readable_texts(sources, split):
        path = source["path"]
        original = originals.setdefault(source["sha256"], path)
        copies += [f"{path} (as {original})"] if path != original else []
    warnings = {
        "damaged files, left out": damaged,
        "empty files": empty,
        "files of the same content, which counts again": copies,
    }
    return [f"{split}: {what}, {examples_line(names)}" for what, names in warnings.items() if names]


def _readable_texts(sources: Iterable[Source], split: str) -> list[Source]:
    return [
        source
        for source in sources
        if source.get("split") == split and source.get("size") and not source.get("damaged")
        if "sha256" in source
    ]


def examples_line(names: Sequence[str], count: int | None = None) -> str:
    """The number of names, and the first of them.

    >>> examples_line(["a", "b"], 5), examples_line(["a"])
    ('5: a, b, ...', '1: a')
    """
    count = len(names) if count is None else count
    more = ", ..." if count > len(names[:_SHOWN]) else ""
    return f"{count:,}: {', '.join(names[:_SHOWN])}{more}"
