"""Builds the token cache: `fope data build`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fope_jax.data import cache as caches
from fope_jax.data.beam import BeamWorkers, Runner, check_runner
from fope_jax.data.build_progress import SplitBar
from fope_jax.data.build_state import BuildState, resume
from fope_jax.data.cache import CacheError, open_cache
from fope_jax.data.cache_directories import (
    FORMAT,
    base_directory,
    built_directories,
    cache_directory,
    cache_identity,
    content_directory,
    partial_directory,
    set_current,
)
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.cache_writer import Progress, SplitWriter, writing_errors
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, read_corpus
from fope_jax.data.manifest import MANIFEST, add_digest, read_manifest
from fope_jax.data.mirror import exclusive_lock, local_directory, upload
from fope_jax.data.parts import list_parts, split_bytes
from fope_jax.data.sources import (
    Source,
    check_damage,
    check_held_out,
    content_digest,
    cut_digest,
    examples_line,
    is_unchanged,
    list_sources,
    source_warnings,
)
from fope_jax.data.tokenized import InProcess, Pool, read_documents, take_first, tfds_documents
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Tokenizer,
    describe_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from fope_jax.data.tokenizers.sentencepiece import TRAINING_TEXT_CHARS
from fope_jax.logs import report_progress
from fope_jax.processes.cores import available_cores
from fope_jax.storage.directories import make_writable
from fope_jax.storage.files import read_json, write_json
from fope_jax.storage.paths import as_path, check_bucket, is_in_bucket

log = logging.getLogger(__name__)

TFDS_DOCUMENTS = 4096  # of a TFDS split, for which another process is worth its start

Manifests = Mapping[Path, dict[str, Any]]  # of complete caches, the one built last first


def build(
    config: DataConfig, runner: Runner | None = None, workers: int | None = None
) -> dict[str, TokenCache]:
    """Builds the token cache of ``config``, or continues an interrupted build; returns its splits.

    A complete cache of unchanged text is only verified; changed text is built into another
    directory, which is read from then on by runs that begin.

    Args:
      runner: Apache Beam tokenizes, instead of processes on this machine; the cache is the same.
      workers: processes that tokenize, of which each takes a file, or a piece of a large one, at a
        time; None means one a core.

    Raises:
      ValueError: ``workers`` is less than 1.
      CorpusError: text is missing, empty, damaged or unreadable.
      ImportError: a ``runner`` without Apache Beam.
      CacheError: the directory cannot be written, or the cache is damaged.
      WriteError: a file cannot be written, as on a full disk.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers = {workers}; accepted: 1 or more")
    if runner is not None:
        check_runner(config)  # before files are looked through
    base = base_directory(config)
    if config.corpus == "none":
        _say("corpus 'none': there is nothing to build")
        return {split: open_cache(config, split) for split in SPLITS}
    if is_in_bucket(base):
        return _build_for_bucket(config, base, runner, workers)
    # Loaded first: fails before hours of work, not after.
    tokenizer = _load_tokenizer(config) if config.tokenizer.endswith(".json") else None
    with _locked(base):
        built = _read_manifests(config)
        sources = _examine_sources(config, built)
        unchanged = _find_unchanged(built, sources, tokenizer)
        if unchanged is not None:
            _warn(built[unchanged]["sources"])
            set_current(config, unchanged)
            return _open_verified(config, " (built before)")
        check_damage(sources, config)
        _warn(sources)
        check_held_out(sources)
        if built:
            _say(
                f"the text of {next(iter(built))} has changed: building another cache beside it;"
                " runs that were trained on it still read it"
            )
        set_current(config, _build_cache(config, base, sources, runner, workers))
        return _open_verified(config)


def _build_for_bucket(
    config: DataConfig, base: Path, runner: Runner | None, workers: int | None
) -> dict[str, TokenCache]:
    """Builds locally, where an interrupted build can continue, and uploads if the text is new."""
    check_bucket(base)
    cache_dir = local_directory(as_path(config.cache_dir))
    local, built = dataclasses.replace(config, cache_dir=str(cache_dir)), _read_manifests(config)
    latest = dict(itertools.islice(built.items(), 1))
    if built and _find_unchanged(latest, _examine_sources(local, built)):
        return _open_verified(config, " (built before)")
    make_writable(base)  # fails before the work, not after it
    result = build(local, runner, workers)
    directory = base.with_name(result[SPLITS[0]].directory.name)
    upload(result[SPLITS[0]].directory, directory, MANIFEST)
    set_current(config, directory)
    _say(f"uploaded to {directory}")
    return result


def _read_manifests(config: DataConfig) -> dict[Path, dict[str, Any]]:
    """The complete caches of ``config`` with their manifests, the one built last first."""
    manifests = {directory: read_manifest(directory) for directory in built_directories(config)}
    return {directory: manifest for directory, manifest in manifests.items() if manifest}


def _find_unchanged(
    built: Manifests, sources: Sequence[Source], tokenizer: JsonTokenizer | None = None
) -> Path | None:
    """The first of these caches that is of this text and tokenizer."""
    for directory, manifest in built.items():
        # The end-of-document token may be named in another file than tokenizer.json.
        same_end = tokenizer is None or tokenizer.eos == manifest["tokenizer"].get("eos")
        if same_end and is_unchanged(manifest, sources):
            return directory
    return None


def _examine_sources(config: DataConfig, built: Manifests) -> list[Source]:
    """Lists the text files, reusing the lists of earlier builds, finished or not."""
    base = base_directory(config)
    path = base.with_name(base.name + ".sources.json")
    before = []
    # A list that cannot be parsed was not written by a build: read the files again.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        before = [dict(source) for source in read_json(path)["sources"]]
    known = [source for manifest in built.values() for source in manifest["sources"]]
    sources = list_sources(config, [*known, *before])
    if sources != before:
        with writing_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"sources": sources})
    return sources


def _warn(sources: Sequence[Source]) -> None:
    for split in SPLITS:
        for line in source_warnings(sources, split):
            _say(line)


def _open_verified(config: DataConfig, remark: str = "") -> dict[str, TokenCache]:
    result = {split: open_cache(config, split) for split in SPLITS}
    for split, cache in result.items():
        cache.verify()
        _say(
            f"{split}: {cache.num_tokens:,} tokens, {cache.summary['documents']:,} documents"
            f" in {cache_directory(config)}{remark}"
        )
    return result


def _build_cache(
    config: DataConfig,
    base: Path,
    sources: list[Source],
    runner: Runner | None,
    workers: int | None,
) -> Path:
    """Builds a cache; returns its directory."""
    partial = partial_directory(base)
    state = resume(partial, cut_digest(sources))
    tokenizer = _make_tokenizer(config, state, sources)
    parts = partial / "parts"
    with contextlib.ExitStack() as stack:
        if runner is not None:
            tokenize = BeamWorkers(config, tokenizer, runner, state.content, str(parts))
        elif (count := _count_workers(config, sources, workers)) == 1:
            tokenize = InProcess(config, tokenizer)
        else:
            tokenize = stack.enter_context(Pool(config, tokenizer, partial, count))
        for split in SPLITS:
            if not state.splits[split].complete:
                _write_split(config, state, tokenize, split, sources)
            _check_split(config, split, state.splits[split])
    shutil.rmtree(parts, ignore_errors=True)
    manifest = _manifest(config, sources, state, tokenizer)
    with writing_errors(partial / MANIFEST):
        write_json(partial / MANIFEST, add_digest(manifest))
    directory = content_directory(base, manifest["fingerprint"])
    if directory.exists():  # without a sound manifest, or it would have been kept
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(directory)
    (directory / state.path.name).unlink()  # last: without it a build begins anew
    return directory


def _count_workers(config: DataConfig, sources: Sequence[Source], workers: int | None) -> int:
    """Processes that tokenize: at most the parts of a split, so one for a little text."""
    most = 0
    for split in SPLITS:
        parts = [list_parts(config, corpus, split, sources) for corpus, _ in config.components]
        # Documents of TFDS go to the pool in groups, whatever files they are in.
        of_tfds = sum(tfds_documents(sources, split)) // TFDS_DOCUMENTS
        most = max(most, sum(map(len, parts)) + of_tfds)
    return max(1, min(workers or len(available_cores()), most))


def _left_out(sources: Iterable[Source]) -> set[str]:
    """The paths of damaged files."""
    return {source["path"] for source in sources if source.get("damaged")}


def _make_tokenizer(config: DataConfig, state: BuildState, sources: Sequence[Source]) -> Tokenizer:
    """The tokenizer of an interrupted build, or a new one, which is saved with the state."""
    if state.tokenizer:
        return load_tokenizer(state.directory, state.tokenizer)
    if config.tokenizer == "bytes":
        tokenizer = BytesTokenizer()
    elif config.tokenizer == "sentencepiece":
        began = time.perf_counter()
        texts = _training_texts(config, _left_out(sources))
        tokenizer = train_sentencepiece(texts, config.vocab_size)
        seconds = time.perf_counter() - began
        _say(
            f"trained a SentencePiece tokenizer of {tokenizer.vocab_size} tokens in {seconds:.1f} s"
        )
    else:
        tokenizer = _load_tokenizer(config)
    with writing_errors(state.directory):
        tokenizer.save(state.directory)
    state.tokenizer = describe_tokenizer(tokenizer)
    state.save()
    return tokenizer


def _load_tokenizer(config: DataConfig) -> JsonTokenizer:
    check_bucket(config.tokenizer)
    return JsonTokenizer.load(as_path(config.tokenizer))


def _training_texts(config: DataConfig, left_out: Collection[str]) -> Iterator[str]:
    """The beginning of every corpus's training split, equally many characters of each."""
    for corpus, _ in config.components:
        if corpus == "c4" and config.tfds_data_dir:
            from fope_jax.data import seqio_tasks  # imports TensorFlow, seconds

            read = seqio_tasks.read_texts
        else:
            read = read_corpus
        left = TRAINING_TEXT_CHARS // len(config.components)
        for document in read(config, corpus, "train", left_out):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def _write_split(
    config: DataConfig,
    state: BuildState,
    tokenize: InProcess,
    split: str,
    sources: Sequence[Source],
) -> None:
    """Writes the documents that a split lacks; each complete shard is saved in ``state``."""
    done = state.splits[split]

    def save(progress: Progress) -> None:
        state.splits[split] = progress
        state.save()

    writer = SplitWriter(
        state.directory,
        split,
        token_bytes=tokenize.tokenizer.token_bytes,
        progress=done,
        save=save,
        prefix_bytes=len(tokenize.tokenizer.prefix.encode()),
        block_tokens=caches.BLOCK_TOKENS,
        shard_tokens=caches.SHARD_TOKENS,
    )
    left_out, remaining = _left_out(sources), _remaining(config, split, done)
    size = split_bytes(config, split, sources, left_out)
    with SplitBar(split, size, _limits(config, split), remaining) as bar:
        documents = read_documents(
            config,
            split,
            tokenize,
            sources,
            skip=dict(done.documents),
            taken=dict(done.tokens),
            part_documents=done.part_documents,
            left_out=left_out,
            report=bar.read,
        )
        for group in take_first(documents, *remaining):
            writer.add(group)
            bar.wrote(group, writer.num_tokens)
            if writer.bad["count"] > config.max_bad_documents:
                raise CorpusError(
                    f"{writer.bad['count']} documents of the {split} split cannot be read, more"
                    f" than max_bad_documents = {config.max_bad_documents}; the first of them:\n  "
                    + "\n  ".join(writer.bad["first"])
                )
    writer.finish()


def _check_split(config: DataConfig, split: str, done: Progress) -> None:
    """Says what a complete split lacks or changes of its text; CorpusError if it is empty."""
    bad, changed = done.bad["count"], done.changed_documents
    if not done.num_tokens:
        raise CorpusError(
            f"the {split} split of corpus {config.corpus!r} is empty:"
            f" {done.empty_documents + bad} documents, none with text"
        )
    remaining = [count for count in _remaining(config, split, done) if count is not None]
    if remaining and min(remaining) > 0:
        named = zip(("max_tokens", "max_documents"), _limits(config, split), strict=True)
        which = " or ".join(f"{name} = {limit}" for name, limit in named if limit)
        _say(f"{split}: the corpus ends after {done.num_tokens:,} tokens, before {which}")
    if done.empty_documents:
        _say(f"{split}: {done.empty_documents:,} documents have no text; they get no tokens")
    if bad:
        _say(
            f"{split}: {bad:,} documents cannot be read and are left out (max_bad_documents ="
            f" {config.max_bad_documents}); the first: {done.bad['first'][0]}"
        )
    if changed:
        _say(
            f"{split}: the tokenizer changes {changed:,} documents: their tokens decode to another"
            f" text; {examples_line(done.first_changed, changed)}"
        )


def _limits(config: DataConfig, split: str) -> tuple[int | None, int | None]:
    """The tokens and documents at which a split ends; None if there is no limit."""
    return (config.max_tokens, config.max_documents) if split == "train" else (None, None)


def _remaining(config: DataConfig, split: str, done: Progress) -> tuple[int | None, int | None]:
    """Tokens and documents that a split may still take; None if there is no limit."""
    tokens, documents = _limits(config, split)
    with_text = sum(done.documents.values()) - done.empty_documents - done.bad["count"]
    return (
        None if tokens is None else tokens - sum(done.tokens.values()),
        None if documents is None else documents - with_text,
    )


def _manifest(
    config: DataConfig, sources: list[Source], state: BuildState, tokenizer: Tokenizer
) -> dict[str, Any]:
    content, fields = content_digest(sources), cache_identity(config)
    identity = [content, tokenizer.fingerprint, config.components, FORMAT]
    identity += [fields.get("validation_books"), fields.get("excluded_books")]
    identity += [[name, fields[name]] for name in ("max_tokens", "max_documents") if name in fields]
    if any(progress.bad["count"] for progress in state.splits.values()):
        identity.append([state.splits[split].bad["digest"] for split in SPLITS])
    return {
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "content": content,
        "config": fields,
        "tokenizer": state.tokenizer,
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
            for split, progress in state.splits.items()
        },
        "sources": sources,
    }


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = exclusive_lock(
        directory.with_name(directory.name + ".lock"),
        lambda: _say(f"another process builds {directory}: waiting for it"),
    )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except OSError as error:
            raise CacheError(
                f"cache_dir = {str(directory.parent)!r} cannot be written: {error}"
            ) from error
        yield


def _say(line: str) -> None:
    report_progress(line, log)
