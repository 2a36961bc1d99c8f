"""Tokenizes on many machines: an Apache Beam pipeline in front of the cache writer.

A worker tokenizes one file of a corpus (a `Part`) and saves the tokens. The build reads the parts
in the order of the files, so the cache is the same to the byte for any runner and worker count.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.cache import token_dtype
from fope_jax.data.config import DataConfig
from fope_jax.data.corpora import CorpusError, match_files, read_corpus, read_file
from fope_jax.data.documents import (
    DOCUMENTS_AT_ONCE,
    TokenizedDocument,
    encode_group,
    interleave_by_tokens,
)
from fope_jax.data.tokenizers import Tokenizer, describe_tokenizer, load_tokenizer
from fope_jax.extras import require
from fope_jax.storage.paths import as_path

_FORMAT = 3  # of the part files


class Runner(NamedTuple):
    """A Beam runner and the directory for the parts.

    Attributes:
      name: in Beam: "DirectRunner" (this machine), "DataflowRunner", "FlinkRunner", ...
      options: "KEY=VALUE", or "KEY" for a switch, without dashes.
      parts: writable by all workers, as ``gs://bucket/parts``; "" for one beside the cache.
    """

    name: str = "DirectRunner"
    options: tuple[str, ...] = ()
    parts: str = ""


class Part(NamedTuple):
    """One file of ``corpus`` to tokenize, or the whole corpus if ``file`` is ""."""

    corpus: str
    split: str
    file: str
    output: str


def read_documents(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    *,
    skip: Mapping[str, int] = {},
    taken: Mapping[str, int] = {},
    left_out: Collection[str] = (),
    runner: Runner,
    content: str,
    partial: Path,
) -> Iterator[TokenizedDocument]:
    """The documents of `fope_jax.data.seqio_tasks.read_documents`, tokenized by ``runner``.

    Parts of another ``content``, a digest of the text, are not reused.

    Raises:
      CorpusError: text cannot be read, or is C4 from TFDS, whose order only its reader knows.
      ImportError: Apache Beam is not installed.
    """
    parts = list_parts(
        config, tokenizer, split, runner.parts or str(partial / "parts"), content, left_out
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        saved = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    description = describe_tokenizer(tokenizer)
    run(parts, functools.partial(tokenize_part, config, description, saved), runner)
    streams = []
    for corpus, _ in config.components:
        documents = _read_parts([part for part in parts if part.corpus == corpus])
        streams.append(itertools.islice(documents, skip.get(corpus, 0), None))
    if config.corpus != "mixture" or split != "train":
        yield from itertools.chain(*streams)
        return
    examples = [
        ({"targets": one.tokens, "bytes": one.bytes, "document": one} for one in stream)
        for stream in streams
    ]
    rates = [rate for _, rate in config.components]
    before = [taken.get(corpus, 0) for corpus, _ in config.components]
    for example in interleave_by_tokens(examples, rates, before):
        yield example["document"]


def list_parts(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    directory: str,
    content: str,
    left_out: Collection[str] = (),
) -> list[Part]:
    """The parts of a split in order; a digest in their paths lets caches share a directory."""
    identity = json.dumps([content, tokenizer.fingerprint, _FORMAT]).encode()
    directory = f"{directory.rstrip('/')}/{hashlib.sha256(identity).hexdigest()[:16]}"
    parts = []
    for corpus, _ in config.components:
        if corpus == "c4" and config.tfds_data_dir:
            raise CorpusError(
                f"tfds_data_dir = {config.tfds_data_dir!r} is not read through Beam, as the order"
                " of its documents is TFDS's own; give the public c4-train.*.json.gz as train_files"
            )
        files = [""] if corpus == "gutenberg" else [str(p) for p in match_files(config, split)]
        for number, file in enumerate(files):
            if file in left_out:
                continue
            output = f"{directory}/{split}-{corpus}-{number:05d}.npz"
            parts.append(Part(corpus, split, file, output))
    return parts


def run(parts: Sequence[Part], work: Callable[[Part], str], runner: Runner) -> None:
    """Runs ``work`` on ``runner`` for every part whose output does not exist."""
    beam: Any = require("apache_beam", "beam")
    options: Any = require("apache_beam.options.pipeline_options", "beam")
    missing = [part for part in parts if not _files().exists(part.output)]
    print(
        f"beam: {len(missing)} of {len(parts)} parts to tokenize with {runner.name}",
        file=sys.stderr,
        flush=True,
    )
    if not missing:
        return
    flags = [f"--runner={runner.name}", *(f"--{o.lstrip('-')}" for o in runner.options)]
    with beam.Pipeline(options=options.PipelineOptions(flags)) as pipeline:
        # Without Reshuffle a runner may fuse Create and Map and run all parts on one worker.
        _ = pipeline | beam.Create(missing) | beam.Reshuffle() | beam.Map(work)


def tokenize_part(
    config: DataConfig, description: dict[str, Any], saved: dict[str, bytes], part: Part
) -> str:
    """Tokenizes one part on a worker; the output file appears whole or not at all."""
    tokenizer = _load(json.dumps(description), tuple(sorted(saved.items())))
    dtype, skip_bad = token_dtype(tokenizer.vocab_size), config.max_bad_documents > 0
    documents = (
        read_file(as_path(part.file), skip_bad)
        if part.file
        else read_corpus(config, part.corpus, part.split)
    )
    names, bad = [], []
    empty = (np.zeros(0, dtype), np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))
    groups: list[tuple[np.ndarray, ...]] = [empty]
    while group := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        names += [document.name for document in group]
        bad += [document.bad for document in group]
        ids, *columns = encode_group(tokenizer, [document.text for document in group])
        groups.append((ids.astype(dtype), *columns))
    tokens, lengths, sizes, changed = map(np.concatenate, zip(*groups, strict=True))
    columns = {
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        "bad": np.frombuffer(json.dumps(bad).encode(), np.uint8),
        "tokens": tokens,
        "lengths": lengths,
        "bytes": sizes,
        "changed": changed,
    }
    _write(part.output, columns)
    return part.output


@functools.cache
def _load(description: str, saved: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in saved:
            (Path(scratch) / name).write_bytes(content)
        return load_tokenizer(Path(scratch), json.loads(description))


def _read_parts(parts: Sequence[Part]) -> Iterator[TokenizedDocument]:
    for part in parts:
        with _files().open(part.output) as stream:
            content = io.BytesIO(stream.read())
        with np.load(content, allow_pickle=False) as columns:
            names, reasons = (json.loads(columns[key].tobytes()) for key in ("names", "bad"))
            sizes, changed = columns["bytes"].tolist(), columns["changed"].tolist()
            tokens = np.split(columns["tokens"].astype(np.int32), np.cumsum(columns["lengths"]))
        rows = zip(names, tokens[:-1], sizes, reasons, changed, strict=True)
        yield from (TokenizedDocument(part.corpus, *row) for row in rows)


def _write(path: str, columns: Mapping[str, Any]) -> None:
    """Writes under a temporary name: two workers may write the same part, and one may be killed."""
    files = _files()
    directory, _, name = path.rpartition("/")
    if not files.exists(directory):
        try:
            files.mkdirs(directory)
        except OSError:  # another worker has made it
            if not files.exists(directory):
                raise
    content = io.BytesIO()
    np.savez(content, **columns)
    temporary = f"{directory}/unfinished-{uuid.uuid4().hex}-{name}"
    with files.create(temporary, mime_type="application/octet-stream") as stream:
        stream.write(content.getvalue())
    if files.exists(path):
        files.delete([temporary])
    else:
        files.rename([temporary], [path])


def _files() -> Any:
    """Beam's file systems: local, ``gs://``, ``s3://``, ``hdfs://``."""
    return require("apache_beam.io.filesystems", "beam").FileSystems
