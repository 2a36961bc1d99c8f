"""Builds the token cache, and describes it: the work behind `fope data build` and `inspect`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data import beam
from fope_jax.data import cache as caches
from fope_jax.data.beam import Runner
from fope_jax.data.cache import (
    CacheError,
    Progress,
    SplitWriter,
    TokenCache,
    TokenizedDocument,
    open_cache,
)
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, read_corpus
from fope_jax.data.manifest import MANIFEST, add_digest, read_manifest
from fope_jax.data.mirror import exclusive_lock, local_directory, upload
from fope_jax.data.sources import (
    check_damage,
    check_held_out,
    content_digest,
    damaged_files,
    examples_line,
    is_unchanged,
    list_sources,
    source_warnings,
)
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from fope_jax.data.tokenizers.sentencepiece import TRAINING_TEXT_CHARS
from fope_jax.extras import require
from fope_jax.storage.directories import make_writable
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import as_path, check_bucket, is_in_bucket

# ---------------------------------------------------------------------------- build


def build(config: DataConfig, runner: Runner | None = None) -> dict[str, TokenCache]:
    """Builds the token cache of ``config``, or goes on where a build was interrupted.

    A complete cache of unchanged text is checked and returned; text that has changed since is
    built anew.

    Args:
      config: which corpus, tokenizer and directory.
      runner: has Apache Beam cut the text into tokens; without it, this process does. The cache
        is the same.

    Returns:
      The cache of each split.

    Raises:
      CorpusError: text that is missing, empty, damaged or cannot be read.
      CacheError: a directory that cannot be written, or a damaged cache.
    """
    directory = caches.cache_directory(config)
    if config.corpus == "none":
        _say("corpus 'none': there is nothing to build")
        return {split: open_cache(config, split) for split in SPLITS}
    if is_in_bucket(directory):
        return _build_for_bucket(config, directory, runner)
    if config.tokenizer.endswith(".json"):  # before anything is written, and before hours of it
        _load_tokenizer(config)
    with _locked(directory):
        manifest = read_manifest(directory)
        sources = _look_through(config, directory, manifest)
        kept = manifest if manifest and is_unchanged(manifest, sources) else None
        if kept is None:
            check_damage(sources, config)
        else:
            sources = kept["sources"]
        for remark in (line for split in SPLITS for line in source_warnings(sources, split)):
            _say(remark)
        if kept is None:
            check_held_out(sources)
            if manifest is not None:
                _say(f"the text of {directory} has changed: building it again")
            _build(config, directory, sources, runner)
        return _checked(config, directory, " (built before)" if kept else "")


def _build_for_bucket(
    config: DataConfig, directory: Path, runner: Runner | None
) -> dict[str, TokenCache]:
    """Builds on this machine, where a build can go on after an interruption, and uploads it whole.

    Where the bucket has a cache of the same text, nothing is built or uploaded.
    """
    check_bucket(directory)
    cache_dir = local_directory(as_path(config.cache_dir))
    local = dataclasses.replace(config, cache_dir=str(cache_dir))
    manifest = read_manifest(directory)
    looked = caches.cache_directory(local)
    if manifest is not None and is_unchanged(manifest, _look_through(local, looked, manifest)):
        return _checked(config, directory, " (built before)")
    make_writable(directory)  # before the work, not after it
    result = build(local, runner)
    upload(caches.cache_directory(local), directory, MANIFEST)
    _say(f"uploaded to {directory}")
    return result


def _look_through(
    config: DataConfig, directory: Path, manifest: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The text's files; what was found is kept beside the cache, so that none is read twice for it.

    The cache itself may be unfinished, in a bucket, or older than a file that has changed.
    """
    path = directory.with_name(directory.name + ".sources.json")
    before = []
    # What is unreadable is of no build of ours: the files are read.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        before = [dict(source) for source in read_json(path)["sources"]]
    sources = list_sources(config, [*(manifest["sources"] if manifest else []), *before])
    if sources != before:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"sources": sources})
    return sources


def _checked(config: DataConfig, directory: Path, remark: str) -> dict[str, TokenCache]:
    """Opens, checks and describes a complete cache."""
    result = {split: open_cache(config, split) for split in SPLITS}
    for split, cache in result.items():
        cache.verify()
        _say(
            f"{split}: {cache.num_tokens:,} tokens, {cache.summary['documents']:,} documents"
            f" in {directory}{remark}"
        )
    return result


def _build(
    config: DataConfig, directory: Path, sources: list[dict[str, Any]], runner: Runner | None
) -> None:
    partial = caches.partial_directory(directory)
    partial.mkdir(parents=True, exist_ok=True)
    state = _resume(partial, content_digest(sources))
    left_out = {source["path"] for split in SPLITS for source in damaged_files(sources, split)}
    tokenizer = _make_tokenizer(config, partial, state, left_out)
    read = _tasks().read_documents
    if runner is not None:
        read = functools.partial(
            beam.read_documents, runner=runner, content=state["content"], partial=partial
        )
    read = functools.partial(read, left_out=left_out)
    for split in SPLITS:
        if not state["splits"][split].complete:
            _write_split(config, partial, state, tokenizer, split, read)
    shutil.rmtree(partial / "parts", ignore_errors=True)
    manifest = _manifest(config, sources, state, tokenizer)
    write_json(partial / MANIFEST, add_digest(manifest))
    (partial / "progress.json").unlink()
    _replace(partial, directory)


def _resume(partial: Path, content: str) -> dict[str, Any]:
    """What an interrupted build of the same text has left; anything else is removed."""
    # What cannot be read is of no build of ours: it begins anew.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        state = read_json(partial / "progress.json")
        if state["content"] == content and "tokenizer" in state:
            state["splits"] = {k: Progress(**v) for k, v in state["splits"].items()}
            done = sum(progress.num_tokens for progress in state["splits"].values())
            _say(f"going on with {partial} after {done:,} tokens")
            return state
    shutil.rmtree(partial)
    partial.mkdir()
    splits = {split: Progress() for split in SPLITS}
    return {"content": content, "tokenizer": None, "splits": splits}


def _save_state(partial: Path, state: dict[str, Any]) -> None:
    splits = {split: dataclasses.asdict(progress) for split, progress in state["splits"].items()}
    write_json(partial / "progress.json", state | {"splits": splits})


def _make_tokenizer(
    config: DataConfig, partial: Path, state: dict[str, Any], left_out: Collection[str]
) -> Tokenizer:
    if state["tokenizer"]:
        return load_tokenizer(partial, state["tokenizer"])
    if config.tokenizer == "bytes":
        tokenizer = BytesTokenizer()
    elif config.tokenizer == "sentencepiece":
        began = time.perf_counter()
        tokenizer = train_sentencepiece(_training_texts(config, left_out), config.vocab_size)
        seconds = time.perf_counter() - began
        _say(
            f"trained a SentencePiece tokenizer of {tokenizer.vocab_size} tokens in {seconds:.1f} s"
        )
    else:
        tokenizer = _load_tokenizer(config)
    tokenizer.save(partial)
    state["tokenizer"] = describe_tokenizer(tokenizer)
    _save_state(partial, state)
    return tokenizer


def _load_tokenizer(config: DataConfig) -> JsonTokenizer:
    check_bucket(config.tokenizer)
    return JsonTokenizer.load(as_path(config.tokenizer))


def _training_texts(config: DataConfig, left_out: Collection[str]) -> Iterator[str]:
    """The beginning of every corpus's training split, in equal parts."""
    for corpus, _ in config.components:
        left = TRAINING_TEXT_CHARS // len(config.components)
        for text in _texts(config, corpus, left_out):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _texts(config: DataConfig, corpus: str, left_out: Collection[str]) -> Iterable[str]:
    if corpus == "c4" and config.tfds_data_dir:
        return _tasks().read_texts(config, corpus, "train", left_out)
    return (document.text for document in read_corpus(config, corpus, "train", left_out))


def _write_split(
    config: DataConfig,
    partial: Path,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    split: str,
    read: Callable[..., Iterator[TokenizedDocument]],
) -> None:
    progress: Progress = state["splits"][split]

    def save(now: Progress) -> None:
        state["splits"][split] = now
        _save_state(partial, state)

    documents = read(config, tokenizer, split, skip=progress.documents, taken=progress.tokens)
    writer = SplitWriter(
        partial,
        split,
        token_bytes=tokenizer.token_bytes,
        progress=progress,
        save=save,
        prefix_bytes=len(tokenizer.prefix.encode()),
        block_tokens=caches.BLOCK_TOKENS,
        shard_tokens=caches.SHARD_TOKENS,
    )
    tqdm = require("tqdm", "train").tqdm
    with tqdm(desc=f"tokenize {split}", unit=" tokens", unit_scale=True) as bar:
        for number, document in enumerate(documents, 1):
            writer.add(document)
            bar.set_postfix_str(f"{number:,} documents", refresh=False)
            bar.update(len(document.tokens))
            if document.bad:
                _check_bad(config, split, writer.bad)
    done = writer.finish()
    if not done.num_tokens:
        raise CorpusError(
            f"the {split} split of corpus {config.corpus!r} is empty:"
            f" {done.empty_documents + done.bad['count']} documents, none with text"
        )
    if done.empty_documents:
        _say(f"{split}: {done.empty_documents:,} documents have no text; they get no tokens")
    if done.bad["count"]:
        _say(
            f"{split}: {done.bad['count']:,} documents cannot be read and are left out"
            f" (max_bad_documents = {config.max_bad_documents}); the first:"
            f" {done.bad['first'][0]}"
        )
    if done.changed_documents:
        _say(
            f"{split}: the tokenizer changes {done.changed_documents:,} documents: their tokens"
            f" decode to another text; {examples_line(done.first_changed, done.changed_documents)}"
        )


def _check_bad(config: DataConfig, split: str, bad: dict[str, Any]) -> None:
    """Raises CorpusError where more documents are bad than may be."""
    if bad["count"] > config.max_bad_documents:
        raise CorpusError(
            f"{bad['count']} documents of the {split} split cannot be read, more than"
            f" max_bad_documents = {config.max_bad_documents}; the first of them:\n  "
            + "\n  ".join(bad["first"])
        )


def _manifest(
    config: DataConfig, sources: list[dict[str, Any]], state: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    content = content_digest(sources)
    identity = [content, tokenizer.fingerprint, config.components, caches.FORMAT]
    fields = caches.cache_identity(config)
    identity += [fields.get("validation_books"), fields.get("excluded_books")]
    bad = {split: progress.bad for split, progress in state["splits"].items()}
    if any(one["count"] for one in bad.values()):
        identity.append([bad[split]["digest"] for split in SPLITS])
    return {
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "content": content,
        "config": fields,
        "tokenizer": state["tokenizer"],
        "dtype": caches.token_dtype(tokenizer.vocab_size).str,
        "block_tokens": caches.BLOCK_TOKENS,
        "shard_tokens": caches.SHARD_TOKENS,
        "splits": {
            split: {
                "documents": sum(shard["documents"]["count"] for shard in progress.shards),
                "bytes": progress.bytes,
                "empty_documents": progress.empty_documents,
                "changed_documents": progress.changed_documents,
                "first_changed": progress.first_changed,
                "bad_documents": progress.bad["count"],
                "first_bad": progress.bad["first"],
                "shards": progress.shards,
            }
            for split, progress in state["splits"].items()
        },
        "sources": sources,
    }


def _replace(partial: Path, directory: Path) -> None:
    """Puts the finished cache in its place; a reader of an older one keeps its open files."""
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One build of a cache at a time."""
    with contextlib.ExitStack() as stack:
        lock = exclusive_lock(
            directory.with_name(directory.name + ".lock"),
            lambda: _say(f"another process builds {directory}: waiting for it"),
        )
        try:
            stack.enter_context(lock)
        except OSError as error:
            raise CacheError(
                f"cache_dir = {str(directory.parent)!r} cannot be written: {error}"
            ) from error
        yield


def _tasks():
    """Imported here, because TensorFlow takes seconds that reading a built cache should not."""
    return importlib.import_module("fope_jax.data.seqio_tasks")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- inspect


def inspect(config: DataConfig, samples: int = 3) -> str:
    """Describes a built cache: sizes, documents by length, and decoded samples.

    Args:
      config: which cache.
      samples: pieces of 64 tokens shown of each split, evenly spaced.
    """
    if config.corpus == "none":
        return f"no text; tasks of the training batches: {', '.join(config.tasks)}"
    parts = []
    for split in SPLITS:
        cache = open_cache(config, split)
        cache.verify()
        if not parts:
            tokenizer = cache.tokenizer
            parts += [
                f"token cache  {cache.directory}",
                f"fingerprint  {cache.fingerprint}",
                f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens,"
                f" {tokenizer.fingerprint[:16]}...",
            ]
        parts += ["", *_describe_split(cache, samples)]
    return "\n".join(parts)


def _describe_split(cache: TokenCache, samples: int) -> list[str]:
    documents, summary = cache.documents, cache.summary
    text_tokens = cache.num_tokens - len(documents)
    lines = [
        f"{cache.split}: {cache.num_tokens:,} tokens, {len(documents):,} documents,"
        f" {summary['bytes']:,} bytes, {summary['bytes'] / text_tokens:.3f} bytes a token",
        f"  without text: {summary['empty_documents']:,} documents;"
        f" changed by the tokenizer: {summary['changed_documents']:,};"
        f" left out as unreadable: {summary.get('bad_documents', 0):,}",
        *(f"    {reason}" for reason in summary.get("first_bad", [])),
        *(f"    changed: {name}" for name in summary.get("first_changed", [])),
        *(f"  {line}" for line in source_warnings(cache.sources, cache.split)),
        "  tokens a document      documents        tokens",
    ]
    lines += _histogram(documents["length"])
    longest = np.argsort(-documents["length"], kind="stable")[:5]
    lines += [f"  {documents['length'][i]:>10,} tokens  {documents['name'][i]}" for i in longest]
    for start in np.linspace(0, max(0, cache.num_tokens - 64), samples).astype(int):
        ids = cache.tokens(start, min(start + 64, cache.num_tokens))
        lines.append(f"  at {start:,}: {cache.tokenizer.decode(ids)!r}")
    return lines


def _histogram(lengths: np.ndarray) -> list[str]:
    """Documents and tokens between powers of two of length.

    >>> print("\\n".join(_histogram(np.array([3, 2, 9]))))
      2 to 3                         2             5
      8 to 15                        1             9
    """
    power = np.frexp(lengths.astype(np.float64))[1] - 1
    lines = []
    for exponent in np.unique(power):
        own = lengths[power == exponent]
        label = f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,}"
        lines.append(f"  {label:<20} {len(own):>11,} {own.sum():>13,}")
    return lines
