"""What the text of a cache is made of: its files, their hashes, which are damaged or alike."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import (
    CorpusError,
    gzip_damage,
    is_text_file,
    source_files,
    starts_with_mark,
    wrong_content,
)
from fope_jax.data.tokenizers import JsonTokenizer
from fope_jax.extras import require
from fope_jax.storage.files import file_sha256, size_and_mtime
from fope_jax.storage.paths import as_path

Source = dict[str, Any]

_SHOWN = 3
_DAMAGED_SHOWN = 20


def list_sources(config: DataConfig, known: Sequence[Source] = ()) -> list[Source]:
    """What the text is made of: each file with its sha256, or a TFDS dataset's identity.

    Every .gz and every TFRecord file of a TFDS dataset is read to its end, every other text looked
    into; its "damaged" says why it cannot be read or holds something else, and is empty where all
    is well. "marked" says of a text that it begins with a byte order mark.

    Args:
      config: which corpora.
      known: earlier results; a file of the same size and time of change is not read again.

    Raises:
      CorpusError: a file is missing, or cannot be read for another reason than damage.
    """
    before = {(s.get("path"), s.get("size"), s.get("mtime_ns")): s for s in known}
    sources = []
    if config.tokenizer not in ("bytes", "sentencepiece"):
        path = as_path(config.tokenizer)
        if path.is_file():
            sources.append(_file_source(path, "tokenizer", "", before))
        else:
            JsonTokenizer.load(path)  # raises the error for a missing file
    for corpus, _ in config.components:
        if corpus == "c4" and config.tfds_data_dir:
            sources += _tfds_sources(config, before)
            continue
        for split in SPLITS:
            files = source_files(config, corpus, split)
            for path in _with_progress(files, f"look through {corpus} {split}"):
                sources.append(_file_source(path, corpus, split, before))
    return sources


def _file_source(path: Path, corpus: str, split: str, before: Mapping[Any, Any]) -> Source:
    try:
        source, same = _cached_source(str(path), size_and_mtime(path), before)
        digest = same.get("sha256") or file_sha256(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    source |= {"corpus": corpus, "split": split, "sha256": digest}
    if split and is_text_file(path):
        find = gzip_damage if path.name.endswith(".gz") else wrong_content
        source["damaged"] = _damage(same, find, path)
        source["marked"] = same["marked"] if "marked" in same else starts_with_mark(path)
    return source


def _tfds_sources(config: DataConfig, before: Mapping[Any, Any]) -> list[Source]:
    # Imported here, because TensorFlow takes seconds.
    tfds_files = importlib.import_module("fope_jax.data.tfds_files")
    sources: list[Source] = [{"corpus": "c4", "tfds": tfds_files.identity(config)}]
    for split in SPLITS:
        files = tfds_files.files_of(config, split)
        for file in _with_progress(files, f"look through c4 {split}"):
            source, same = _cached_source(file.path, tfds_files.size_and_mtime(file), before)
            source |= {"corpus": "c4", "split": split, "shard": file.shard}
            sources.append(source | {"damaged": _damage(same, tfds_files.damage_of, file)})
    return sources


def _cached_source(
    path: str, size_and_mtime: tuple[int, int], before: Mapping[Any, Source]
) -> tuple[Source, Source]:
    """What tells a file from others, and what an earlier result says of it, or nothing."""
    size, changed = size_and_mtime
    return (
        {"path": path, "size": size, "mtime_ns": changed},
        before.get((path, size, changed), {}),
    )


def _damage(same: Source, find: Callable[[Any], str], file: Any) -> str:
    """What is wrong with a file; from an earlier result only where it was looked through then."""
    return same["damaged"] if "damaged" in same else find(file)


def _with_progress(files: Sequence[Any], what: str) -> Iterable[Any]:
    tqdm = require("tqdm", "train").tqdm
    return tqdm(files, desc=what, unit=" files", delay=2, leave=False)


def content_digest(sources: Sequence[Source]) -> str:
    """A hex digest of the text, the same wherever the files lie."""
    parts = [
        [s["corpus"], s.get("split"), s.get("sha256"), s.get("tfds")]
        for s in sources
        if "sha256" in s or "tfds" in s
    ]
    # What is left out decides what a build gives, and the bytes of a TFDS file are in no digest.
    parts += [
        ["damaged", s["split"], s.get("shard", s.get("sha256"))]
        for s in sources
        if s.get("damaged")
    ]
    # A cache from when the mark was part of the text is of another text.
    parts += [["marked", s["split"], s["sha256"]] for s in sources if s.get("marked")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------- damaged


def damaged_files(sources: Iterable[Source], split: str) -> list[Source]:
    """The files of a split that are damaged, and left out where that is allowed."""
    return [s for s in sources if s.get("split") == split and s.get("damaged")]


def check_damage(sources: Sequence[Source], config: DataConfig) -> None:
    """Raises CorpusError where more files of a split are damaged than may be."""
    for split in SPLITS:
        damaged = damaged_files(sources, split)
        if len(damaged) > config.max_damaged_files:
            shown = [source["damaged"] for source in damaged[:_DAMAGED_SHOWN]]
            raise CorpusError(
                f"damaged files of the {split} split: {len(damaged)}, more than"
                f" max_damaged_files = {config.max_damaged_files}\n  " + "\n  ".join(shown)
            )


def is_unchanged(manifest: Mapping[str, Any], sources: Sequence[Source]) -> bool:
    """Whether a complete cache is of this text.

    A file that was whole when it was built, and is damaged now, does no harm to the cache.
    """
    before = {_place(source): source for source in manifest["sources"]}

    def when_built(source: Source) -> Source:
        own = before.get(_place(source), {})
        if not source.get("damaged") or own.get("damaged"):
            return source
        return source | own | {"damaged": ""}

    return manifest["content"] == content_digest([when_built(source) for source in sources])


def _place(source: Source) -> tuple[Any, ...]:
    return source["corpus"], source.get("split"), source.get("shard", source.get("path"))


# ---------------------------------------------------------------------------- alike, or empty


def check_held_out(sources: Iterable[Source]) -> None:
    """Raises CorpusError where a training file and a held-out file have the same content."""
    train: dict[str, str] = {}
    for source in _texts(sources, "train"):
        train.setdefault(source["sha256"], source["path"])
    for source in _texts(sources, "validation"):
        same = train.get(source["sha256"])
        if same is not None and same != source["path"]:  # both splits of the books are one file
            raise CorpusError(
                f"validation file {source['path']} has the same content as training file {same}:"
                " what a model was trained on says nothing about it; take one of them out"
            )


def source_warnings(sources: Sequence[Source], split: str) -> list[str]:
    """Lines about files of a split that are damaged, empty, or copies of others.

    Copies stay: a text may be meant to count twice, and only its owner knows.
    """
    lines = []
    damaged = [source["damaged"] for source in damaged_files(sources, split)]
    if damaged:
        lines.append(f"{split}: damaged files, left out, {examples_line(damaged)}")
    own = [source for source in sources if source.get("split") == split]
    empty = [s["path"] for s in own if s.get("size") == 0 and not s.get("damaged")]
    if empty:
        lines.append(f"{split}: empty files, {examples_line(empty)}")
    first: dict[str, str] = {}
    copies = []
    for source in _texts(sources, split):
        path = source["path"]
        original = first.setdefault(source["sha256"], path)
        if path != original:
            copies.append(f"{path} (as {original})")
    if copies:
        lines.append(
            f"{split}: files of the same content, which counts again, {examples_line(copies)}"
        )
    return lines


def _texts(sources: Iterable[Source], split: str) -> Iterable[Source]:
    """The files of a split whose content is known, and is any."""
    own = (s for s in sources if s.get("split") == split and s.get("size"))
    return (s for s in own if "sha256" in s and not s.get("damaged"))


def examples_line(names: Sequence[str], count: int | None = None) -> str:
    """How many names there are, and the first of them.

    >>> examples_line(["a", "b"], 5), examples_line(["a"])
    ('5: a, b, ...', '1: a')
    """
    count = len(names) if count is None else count
    more = ", ..." if count > len(names[:_SHOWN]) else ""
    return f"{count:,}: {', '.join(names[:_SHOWN])}{more}"
