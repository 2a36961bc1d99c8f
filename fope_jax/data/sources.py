"""What the text of a cache is made of: its files and their hashes, and which of them are alike."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, source_files
from fope_jax.data.tokenizer import JsonTokenizer
from fope_jax.files import as_path, file_sha256, size_and_time

Source = dict[str, Any]

_SHOWN = 3


def list_sources(config: DataConfig, known: Sequence[Source] = ()) -> list[Source]:
    """What the text is made of: each file with its sha256, or a TFDS dataset's identity.

    Args:
      config: which corpora.
      known: an earlier result; a file of the same size and time of change is not read again.
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
            # Imported here, because TensorFlow takes seconds.
            tfds_files = importlib.import_module("fope_jax.data.tfds_files")
            sources.append({"corpus": corpus, "tfds": tfds_files.identity(config)})
            continue
        for split in SPLITS:
            for path in source_files(config, corpus, split):
                sources.append(_file_source(path, corpus, split, before))
    return sources


def _file_source(path: Path, corpus: str, split: str, before: Mapping[Any, Any]) -> Source:
    size, changed = size_and_time(path)
    source = {"path": str(path), "size": size, "mtime_ns": changed}
    same = before.get(tuple(source.values()))
    digest = same["sha256"] if same else file_sha256(path)
    return source | {"corpus": corpus, "split": split, "sha256": digest}


def content_digest(sources: Iterable[Source]) -> str:
    """A hex digest of the text, the same wherever the files lie."""
    parts = [[s["corpus"], s.get("split"), s.get("sha256"), s.get("tfds")] for s in sources]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
    """Lines about files of a split that are empty, or copies of others.

    Copies stay: a text may be meant to count twice, and only its owner knows.
    """
    lines = []
    own = [source for source in sources if source.get("split") == split]
    empty = [source["path"] for source in own if source.get("size") == 0]
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
    return (s for s in sources if s.get("split") == split and s.get("size"))


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,}: {', '.join(names[:_SHOWN])}{more}"
