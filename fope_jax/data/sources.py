"""What the text of a cache is made of: its files, their hashes, which are damaged or alike."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, gzip_damage, source_files
from fope_jax.data.tokenizer import JsonTokenizer
from fope_jax.extras import require
from fope_jax.files import as_path, file_sha256, size_and_time

Source = dict[str, Any]

_SHOWN = 3
_DAMAGED_SHOWN = 20


def list_sources(config: DataConfig, known: Sequence[Source] = ()) -> list[Source]:
    """What the text is made of: each file with its sha256, or a TFDS dataset's identity.

    Every .gz and every file of a TFDS dataset is read to its end, and "damaged" says why where it
    cannot be.

    Args:
      config: which corpora.
      known: an earlier result; a file of the same size and time of change is not read again.

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
    size, changed = size_and_time(path)
    source = {"path": str(path), "size": size, "mtime_ns": changed}
    same = before.get(tuple(source.values()))
    digest = same["sha256"] if same else file_sha256(path)
    source |= {"corpus": corpus, "split": split, "sha256": digest}
    if path.name.endswith(".gz"):
        return _with_damage(source, same, gzip_damage, path)
    return source


def _tfds_sources(config: DataConfig, before: Mapping[Any, Any]) -> list[Source]:
    # Imported here, because TensorFlow takes seconds.
    tfds_files = importlib.import_module("fope_jax.data.tfds_files")
    sources: list[Source] = [{"corpus": "c4", "tfds": tfds_files.identity(config)}]
    for split in SPLITS:
        files = tfds_files.files_of(config, split)
        for file in _with_progress(files, f"look through c4 {split}"):
            size, changed = tfds_files.size_and_time(file)
            source = {"path": file.path, "size": size, "mtime_ns": changed}
            same = before.get(tuple(source.values()))
            source |= {"corpus": "c4", "split": split, "shard": file.shard}
            sources.append(_with_damage(source, same, tfds_files.damage_of, file))
    return sources


def _with_damage(
    source: Source, same: Source | None, find: Callable[[Any], str], file: Any
) -> Source:
    damage = same.get("damaged", "") if same else find(file)
    return source | ({"damaged": damage} if damage else {})


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
    # The bytes of a TFDS file are in no digest; whether it is left out must be.
    parts += [
        ["damaged", s["split"], s["shard"]] for s in sources if "damaged" in s and "shard" in s
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------- damaged


def damaged_files(sources: Iterable[Source], split: str) -> list[Source]:
    """The files of a split that are damaged, and left out where that is allowed."""
    return [s for s in sources if s.get("split") == split and "damaged" in s]


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


def is_unchanged(content: str, sources: Sequence[Source]) -> bool:
    """Whether ``content``, the digest of a complete cache, is of this text.

    A TFDS file that was whole then and is damaged now does no harm to the cache.
    """
    whole = [{k: v for k, v in source.items() if k != "damaged"} for source in sources]
    return content in (content_digest(sources), content_digest(whole))


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


def remarks(sources: Sequence[Source], split: str) -> list[str]:
    """Lines about files of a split that are damaged, empty, or copies of others.

    Copies stay: a text may be meant to count twice, and only its owner knows.
    """
    lines = []
    damaged = [source["damaged"] for source in damaged_files(sources, split)]
    if damaged:
        lines.append(f"{split}: damaged files, left out, {_some(damaged)}")
    own = [source for source in sources if source.get("split") == split]
    empty = [s["path"] for s in own if s.get("size") == 0 and "damaged" not in s]
    if empty:
        lines.append(f"{split}: empty files, {_some(empty)}")
    first: dict[str, str] = {}
    copies = []
    for source in _texts(sources, split):
        path = source["path"]
        original = first.setdefault(source["sha256"], path)
        if path != original:
            copies.append(f"{path} (as {original})")
    if copies:
        lines.append(f"{split}: files of the same content, which counts again, {_some(copies)}")
    return lines


def _texts(sources: Iterable[Source], split: str) -> Iterable[Source]:
    """The files of a split whose content is known, and is any."""
    own = (s for s in sources if s.get("split") == split and s.get("size"))
    return (s for s in own if "sha256" in s and "damaged" not in s)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,}: {', '.join(names[:_SHOWN])}{more}"
