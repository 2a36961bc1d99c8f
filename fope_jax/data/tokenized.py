"""The tokenized documents of a split, in one order however many processes tokenize.

The files of a corpus are cut into parts: small files together, a large one in pieces where its
format allows that. Each part is tokenized in this process, in one of a pool, or by Apache Beam
(`fope_jax.data.beam`), and the parts are read in the order of the files. The order of a TFDS
dataset is that of its own reader, so its documents are read here and sent to the pool in groups.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data.config import DataConfig
from fope_jax.data.documents import (
    CorpusError,
    Document,
    TokenizedDocuments,
    group_documents,
    interleave_by_tokens,
)
from fope_jax.data.parts import (
    Part,
    list_parts,
    part_name,
    read_saved_part,
    remove_part,
    save_part,
    take_documents,
    tokenize_group,
    tokenize_part,
)
from fope_jax.data.sources import Source
from fope_jax.data.tokenizers import Tokenizer, describe_tokenizer, load_tokenizer
from fope_jax.processes.cores import available_cores

_AHEAD = 2  # parts of each worker that are tokenized before they are read


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
        threads = max(1, len(available_cores()) // workers)
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
    """The documents of parts from number ``skip``; ``counts``, documents of each part, grows."""
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

    def share(count: int) -> int:
        return size * min(count, documents) // max(documents, 1)

    report(share(skipped))
    for group in groups:
        yield group
        before, skipped = skipped, skipped + len(group.lengths)
        report(share(skipped) - share(before))
    report(size - share(skipped))


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
