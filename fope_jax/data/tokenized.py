"""The tokenized documents of a split, in one order however many processes tokenize.

The files of a corpus are cut into parts: small files together, a large one in pieces where its
format allows that. Each part is tokenized in this process, in one of a pool,
or by Apache Beam (`fope_jax.data.beam`), and the parts are read in the order of the files. The
order of a TFDS dataset is that of its own reader, so its documents are read here and sent to the
pool in groups.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.cache_reader import token_dtype
from fope_jax.data.cache_writer import writing_errors
from fope_jax.data.config import DataConfig
from fope_jax.data.corpora import WHOLE, Piece, read_corpus, read_file
from fope_jax.data.documents import (
    CorpusError,
    Document,
    TokenizedDocuments,
    encode_group,
    group_documents,
    interleave_by_tokens,
)
from fope_jax.data.sources import Source
from fope_jax.data.tokenizers import Tokenizer, describe_tokenizer, load_tokenizer
from fope_jax.storage.paths import as_path, is_in_bucket

PART_BYTES = 2**23  # small files share a part
_READ_TOKENS = 2**20  # of a saved part at a time
_AHEAD = 2  # parts of each worker that are tokenized before they are read


class Part(NamedTuple):
    """Files of a corpus that one process tokenizes, with their bytes; no file: the whole corpus.

    ``piece`` is that of a single file.
    """

    corpus: str
    split: str
    number: int
    files: tuple[str, ...]
    size: int
    piece: Piece = WHOLE


def list_parts(
    config: DataConfig,
    corpus: str,
    split: str,
    sources: Iterable[Source],
    left_out: Collection[str] = (),
) -> list[Part]:
    """The parts of a split in order: large files or their pieces, small files up to ``PART_BYTES``.

    None for C4 from TFDS, whose reader mixes its files.
    """
    if corpus == "c4" and config.tfds_data_dir:
        return []
    files = [s for s in sources if (s["corpus"], s.get("split")) == (corpus, split)]
    if corpus == "gutenberg":
        return [Part(corpus, split, 0, (), _book_bytes(config, split))]
    parts: list[Part] = []
    for file in files:
        if file["path"] in left_out:
            continue
        if pieces := file.get("pieces"):
            whole = Part(corpus, split, 0, (file["path"],), file["size"] // len(pieces))
            for piece in pieces:
                parts.append(whole._replace(number=len(parts), piece=Piece(*piece)))
        elif parts and parts[-1].piece == WHOLE and parts[-1].size + file["size"] <= PART_BYTES:
            last = parts[-1]
            size, names = last.size + file["size"], (*last.files, file["path"])
            parts[-1] = last._replace(files=names, size=size)
        else:
            parts.append(Part(corpus, split, len(parts), (file["path"],), file["size"]))
    return parts


def split_bytes(
    config: DataConfig, split: str, sources: Iterable[Source], left_out: Collection[str] = ()
) -> int:
    """Bytes that `read_documents` reports: of files, or of the books in the package of all."""
    files = [s for s in sources if s.get("split") == split and s["path"] not in left_out]
    corpora = {file["corpus"] for file in files}
    size = sum(file["size"] for file in files if file["corpus"] != "gutenberg")
    return size + (_book_bytes(config, split) if "gutenberg" in corpora else 0)


def _book_bytes(config: DataConfig, split: str) -> int:
    return sum(len(book.text.encode()) for book in read_corpus(config, "gutenberg", split))


class InProcess:
    """Tokenizes in this process.

    Args:
      config, tokenizer: of the build.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def read_parts(
        self, parts: Sequence[Part]
    ) -> Iterator[Callable[[int], Iterator[TokenizedDocuments]]]:
        """For each part in order, the function of ``skip`` that reads its documents from there."""
        for part in parts:
            yield functools.partial(tokenize_part, self.config, self.tokenizer, part)

    def encode(
        self, corpus: str, groups: Iterable[Sequence[Document]]
    ) -> Iterator[TokenizedDocuments]:
        """Groups of documents, tokenized, in order."""
        for group in groups:
            yield tokenize_group(self.tokenizer, corpus, group)


class Pool(InProcess):
    """Tokenizes in ``workers`` processes; a context manager.

    Args:
      directory: where the tokenizer's file is, and for the parts.
      workers: processes, which share the cores.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, directory: Path, workers: int):
        super().__init__(config, tokenizer)
        self._directory, self._ahead = directory / "parts", _AHEAD * workers
        threads = max(1, count_cores() // workers)
        description = json.dumps(describe_tokenizer(tokenizer))
        self._load = functools.partial(_load_in_worker, description, str(directory), threads)
        # Spawned: a fork of a process with threads may wait for ever.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (threads,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_parts(
        self, parts: Sequence[Part]
    ) -> Iterator[Callable[[int], Iterator[TokenizedDocuments]]]:
        outputs = [str(self._directory / part_name(part)) for part in parts]
        tasks = (
            functools.partial(save_part, self.config, self._load, part, output)
            for part, output in zip(parts, outputs, strict=True)
        )
        for part, output in zip(parts, self._in_order(tasks), strict=True):
            yield functools.partial(read_saved_part, part, output)
            # Read; if the build is stopped before a shard of it is full, it is tokenized again.
            remove_part(output)

    def encode(
        self, corpus: str, groups: Iterable[Sequence[Document]]
    ) -> Iterator[TokenizedDocuments]:
        encode = functools.partial(_encode_in_worker, self._load, corpus)
        return self._in_order(functools.partial(encode, list(group)) for group in groups)

    def _in_order(self, tasks: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """The results of tasks in order; a few are worked on ahead."""
        waiting: deque[Future[Any]] = deque()
        left = iter(tasks)
        try:
            waiting.extend(self._pool.submit(task) for task in itertools.islice(left, self._ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(self._pool.submit(task) for task in itertools.islice(left, 1))
                yield result
        except BrokenProcessPool as error:
            raise CorpusError(
                "a process that tokenizes was killed, perhaps for lack of memory; the same command"
                " goes on, with --workers N in fewer processes"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def read_documents(
    config: DataConfig,
    split: str,
    workers: InProcess,
    sources: Sequence[Source],
    *,
    skip: Mapping[str, int] = {},
    taken: Mapping[str, int] = {},
    part_documents: dict[str, list[int]] | None = None,
    left_out: Collection[str] = (),
    report: Callable[[int], Any] = lambda size: None,
) -> Iterator[TokenizedDocuments]:
    """The tokenized documents of a split.

    A training mixture follows its weights, a validation mixture goes corpus by corpus.

    Args:
      sources: as of `fope_jax.data.sources.list_sources`.
      skip, taken: documents and tokens of each corpus that were read before.
      part_documents: documents of the parts that were read, by corpus; grows.
      left_out: paths of files that are not read.
      report: called with the bytes of files that have been read; within a file they are estimated.

    Raises:
      CorpusError: unreadable text if ``max_bad_documents`` is 0, truncated TFDS files.
    """
    part_documents = {} if part_documents is None else part_documents
    streams = []
    for corpus, _ in config.components:
        skipped = skip.get(corpus, 0)
        if corpus == "c4" and config.tfds_data_dir:
            from fope_jax.data import seqio_tasks  # imports TensorFlow, seconds

            documents = seqio_tasks.read_texts(config, corpus, split, left_out, skipped)
            stream = workers.encode(corpus, group_documents(documents))
            streams.append(_report_share(stream, skipped, sources, split, left_out, report))
            continue
        parts = list_parts(config, corpus, split, sources, left_out)
        counts = part_documents.setdefault(corpus, [])
        streams.append(_read_parts(parts, skipped, counts, workers, report))
    if config.corpus != "mixture" or split != "train":
        return itertools.chain.from_iterable(streams)
    rates = [rate for _, rate in config.components]
    before = [taken.get(corpus, 0) for corpus, _ in config.components]
    examples = [map(_as_example, _split_group(stream)) for stream in streams]
    mixed = interleave_by_tokens(examples, rates, before)
    return (example["document"] for example in mixed)


def _read_parts(
    parts: Sequence[Part],
    skip: int,
    counts: list[int],
    workers: InProcess,
    report: Callable[[int], Any],
) -> Iterator[TokenizedDocuments]:
    done = 0
    while done < len(counts) and counts[done] <= skip:
        skip -= counts[done]
        report(parts[done].size)
        done += 1
    del counts[done:]
    file_bytes = 1.0  # for a byte of text, as it was in the part before
    for part, read in zip(parts[done:], workers.read_parts(parts[done:]), strict=True):
        count, text, reported = skip, 0, 0
        for group in read(skip):
            count += len(group.lengths)
            yield group
            text += int(group.bytes.sum())
            now = min(part.size, int(text * file_bytes))
            report(now - reported)
            reported = now
        if text and not skip:
            file_bytes = part.size / text
        counts.append(count)
        skip = 0
        report(part.size - reported)


def _report_share(
    groups: Iterable[TokenizedDocuments],
    skipped: int,
    sources: Sequence[Source],
    split: str,
    left_out: Collection[str],
    report: Callable[[int], Any],
) -> Iterator[TokenizedDocuments]:
    """The groups of a TFDS split; its files count as read by the share of documents."""
    files = [s for s in sources if "shard" in s and s["split"] == split]
    files = [file for file in files if file["path"] not in left_out]
    counts = tfds_documents(sources, split)
    documents, size = sum(counts[f["shard"]] for f in files), sum(f["size"] for f in files)
    reported = 0
    for group in itertools.chain([None], groups):
        if group is not None:
            yield group
            skipped += len(group.lengths)
        now = size * min(skipped, documents) // max(documents, 1)
        report(now - reported)
        reported = now
    report(size - reported)


def tfds_documents(sources: Iterable[Source], split: str) -> list[int]:
    """Documents of each file of a TFDS split, by its number; none for other corpora."""
    found = (entry for source in sources for entry in source.get("tfds", ())[1:])
    return next((counts for name, _, counts in found if name == split), [])


def _split_group(groups: Iterable[TokenizedDocuments]) -> Iterator[TokenizedDocuments]:
    """Documents one by one, for a mixture that takes its next document by the tokens so far."""
    for group in groups:
        ends = np.cumsum(group.lengths).tolist()
        for i, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            yield take_documents(group, i, i + 1, begin, end)


def _as_example(one: TokenizedDocuments) -> dict[str, Any]:
    return {"targets": one.tokens, "bytes": int(one.bytes[0]), "document": one}


def take_documents(
    group: TokenizedDocuments, first: int, last: int, begin: int, end: int
) -> TokenizedDocuments:
    """Documents ``[first, last)`` of a group, whose tokens are ``[begin, end)`` of it."""
    part = slice(first, last)
    return TokenizedDocuments(
        group.corpus,
        group.names[part],
        group.tokens[begin:end],
        group.lengths[part],
        group.bytes[part],
        group.bad[part],
        group.changed[part],
    )


def take_first(
    groups: Iterable[TokenizedDocuments], tokens: int | None, documents: int | None
) -> Iterator[TokenizedDocuments]:
    """Documents up to the one that reaches ``tokens``, or ``documents`` with text; it is whole."""
    for group in groups:
        has_text = group.bytes > 0
        stop = len(group.lengths) + 1
        for limit, sizes in ((tokens, group.lengths), (documents, 1)):
            if limit is not None:
                taken = np.cumsum(np.where(has_text, sizes, 0))
                stop = min(stop, int(np.searchsorted(taken, limit)) + 1 if limit > 0 else 0)
        if stop <= len(group.lengths):
            if stop:
                yield take_documents(group, 0, stop, 0, int(group.lengths[:stop].sum()))
            return
        yield group
        if tokens is not None:
            tokens -= int(group.lengths[has_text].sum())
        if documents is not None:
            documents -= int(has_text.sum())


# ---------------------------------------------------------------------------- a part


def tokenize_group(
    tokenizer: Tokenizer, corpus: str, group: Sequence[Document]
) -> TokenizedDocuments:
    tokens, *columns = encode_group(tokenizer, [document.text for document in group])
    lengths, sizes, changed = columns
    names, bad = [d.name for d in group], [d.bad for d in group]
    return TokenizedDocuments(corpus, names, tokens, lengths, sizes, bad, changed)


def tokenize_part(
    config: DataConfig, tokenizer: Tokenizer, part: Part, skip: int = 0
) -> Iterator[TokenizedDocuments]:
    """The documents of a part from number ``skip``."""
    lenient = config.max_bad_documents > 0
    if part.files:
        documents = itertools.chain.from_iterable(
            read_file(as_path(file), lenient, config.text_field, part.piece) for file in part.files
        )
    else:
        documents = read_corpus(config, part.corpus, part.split)
    for group in group_documents(itertools.islice(documents, skip, None)):
        yield tokenize_group(tokenizer, part.corpus, group)


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the library tokenizers


@functools.cache
def _load_in_worker(description: str, directory: str, threads: int) -> Tokenizer:
    tokenizer = load_tokenizer(Path(directory), json.loads(description))
    tokenizer.num_threads = threads
    return tokenizer


def _encode_in_worker(
    load: Callable[[], Tokenizer], corpus: str, group: Sequence[Document]
) -> TokenizedDocuments:
    return tokenize_group(load(), corpus, group)


def part_name(part: Part) -> str:
    return f"{part.split}-{part.corpus}-{part.number:05d}"


def save_part(config: DataConfig, load: Callable[[], Tokenizer], part: Part, output: str) -> str:
    """Tokenizes a part on a worker, unless that is done; its ``.npz`` appears last, and whole."""
    if as_path(output + ".npz").exists():
        return output
    tokenizer = load()
    dtype = token_dtype(tokenizer.vocab_size)
    columns: dict[str, list[Any]] = {name: [] for name in ("lengths", "bytes", "changed")}
    names, bad = [], []
    with _written_whole(output + ".tokens") as stream:
        for group in tokenize_part(config, tokenizer, part):
            stream.write(group.tokens.astype(dtype).tobytes())
            names += group.names
            bad += group.bad
            for name, values in columns.items():
                values.append(getattr(group, name))
    arrays: dict[str, Any] = {k: np.concatenate([[], *v]) for k, v in columns.items()}
    texts = {"names": names, "bad": bad}
    arrays |= {k: np.frombuffer(json.dumps(v).encode(), np.uint8) for k, v in texts.items()}
    content = io.BytesIO()
    np.savez(content, dtype=np.array(dtype.str), **arrays)
    with _written_whole(output + ".npz") as stream:
        stream.write(content.getvalue())
    return output


def read_saved_part(part: Part, output: str, skip: int = 0) -> Iterator[TokenizedDocuments]:
    """The documents of a saved part from number ``skip``, some at a time."""
    content = io.BytesIO(as_path(output + ".npz").read_bytes())
    with np.load(content, allow_pickle=False) as columns:
        names, bad = (json.loads(columns[key].tobytes()) for key in ("names", "bad"))
        lengths, sizes = (columns[key].astype(np.int64) for key in ("lengths", "bytes"))
        changed, dtype = columns["changed"].astype(bool), np.dtype(str(columns["dtype"]))
    path = as_path(output + ".tokens")
    tokens = np.fromfile(path, dtype) if not is_in_bucket(path) else None
    tokens = np.frombuffer(path.read_bytes(), dtype) if tokens is None else tokens
    whole = TokenizedDocuments(part.corpus, names, tokens, lengths, sizes, bad, changed)
    ends = np.append(0, np.cumsum(lengths))
    first = skip
    while first < len(lengths):
        last = int(np.searchsorted(ends, ends[first] + _READ_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        yield take_documents(whole, first, last, int(ends[first]), int(ends[last]))
        first = last


def remove_part(output: str) -> None:
    for suffix in (".npz", ".tokens"):
        as_path(output + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _written_whole(output: str) -> Iterator[Any]:
    """A file under a temporary name: two workers may write the same, and one may be killed."""
    path = as_path(output)
    with writing_errors(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_in_bucket(path):  # an object appears when it is whole
            with path.open("wb") as stream:
                yield stream
            return
        temporary = path.with_name(f"unfinished-{uuid.uuid4().hex}-{path.name}")
        try:
            with temporary.open("wb") as stream:
                yield stream
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
