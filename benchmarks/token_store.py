"""Token stores of any size: their build, opening, first batch, and what each process reads.

    python -m benchmarks.token_store open --documents 1e4 1e6 365e6
    python -m benchmarks.token_store build --documents 1e4 --workers 1 2
    python -m benchmarks.token_store share --documents 2e4
    python -m benchmarks.token_store processes

`open` and `processes` read simulated stores: their indices are real, of documents like C4's (430
tokens on average), and their tokens are zeros in sparse files, which take no room on a disk; those
of `processes` are not zeros. The index takes 10 bytes a document: 3.5 GB for all of C4. "before"
are stores of ArrayRecord files, as older versions wrote them. Each store is opened in a process of
its own. `build` tokenizes random words with a byte-level BPE of 4,096 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fope_jax.data import DataConfig, build
from fope_jax.data.cache import BLOCK_TOKENS, SHARD_TOKENS, make_cache
from fope_jax.data.cache_writer import index_rows
from fope_jax.data.config import Packing
from fope_jax.data.corpora import read_file
from fope_jax.data.documents import group_documents
from fope_jax.data.loader import Loader
from fope_jax.data.local_files import LocalFiles
from fope_jax.data.manifest import MANIFEST, add_digest, read_manifest
from fope_jax.data.parts import list_parts, save_part
from fope_jax.data.sources import list_sources
from fope_jax.data.tokenizers import BytesTokenizer, JsonTokenizer, describe_tokenizer
from fope_jax.extras import require
from fope_jax.processes.cores import available_cores
from fope_jax.storage.files import file_sha256

LENGTH, BATCH_SIZE = 512, 1024
STEPS = 20
MOST_ALONE = 20_000  # documents that the tokenizer alone is given
MOST_BEFORE = 10_000_000  # documents; more do not fit into memory as they were stored before
TOKENIZER = "tokenizer.json"
_OLD_BLOCK = 2**14


def document_starts(documents: int) -> Iterator[np.ndarray]:
    """The starts of the documents of each shard, counted from its first token, and the shard's end.

    The shards are alike, and each begins with a document.
    """
    lengths = np.random.default_rng(0).integers(100, 761, SHARD_TOKENS // 100)
    lengths = lengths[np.cumsum(lengths) <= SHARD_TOKENS]
    lengths[-1] += SHARD_TOKENS - lengths.sum()
    edges = np.append(0, np.cumsum(lengths))
    while documents > 0:
        yield edges[: documents + 1]
        documents -= len(edges) - 1


def simulate(directory: Path, documents: int, real_tokens: bool = False) -> None:
    """Writes a store whose training split has so many documents."""
    shards = [
        _write_shard(directory, number, edges, real_tokens)
        for number, edges in enumerate(document_starts(documents))
    ]
    _write_manifest(directory, documents, shards, BLOCK_TOKENS)


def simulate_before(directory: Path, documents: int) -> None:
    """The same store as older versions wrote it."""
    writer = require("array_record.python.array_record_module", "train").ArrayRecordWriter
    shards, done = [], 0
    for number, edges in enumerate(document_starts(documents)):
        size, name, count = int(edges[-1]), f"train-{number:05d}", len(edges) - 1
        stream = writer(str(directory / f"{name}.array_record"), "group_size:1")
        for begin in range(0, size, _OLD_BLOCK):
            stream.write(bytes(2 * min(_OLD_BLOCK, size - begin)))
        stream.close()
        names = json.dumps([f"c4-train.json.gz:{done + i}" for i in range(count)]).encode()
        columns = {"start": edges[:-1] + number * SHARD_TOKENS, "length": np.diff(edges)}
        columns |= {"bytes": 4 * np.diff(edges), "names": np.frombuffer(names, np.uint8)}
        np.savez(directory / f"{name}.documents.npz", **columns)
        done += count
        table = {"file": f"{name}.documents.npz", "count": count}
        shard = {"file": f"{name}.array_record", "tokens": size}
        hashes = [{"sha256": file_sha256(directory / e["file"])} for e in (shard, table)]
        shards.append(shard | hashes[0] | {"documents": table | hashes[1]})
    _write_manifest(directory, documents, shards, _OLD_BLOCK)


def _write_manifest(directory: Path, documents: int, shards: list[Any], block: int) -> None:
    none = {"documents": 0, "bytes": 0, "empty_documents": 0, "changed_documents": 0, "shards": []}
    manifest = {
        "fingerprint": "0" * 64,
        "content": "0" * 64,
        "config": {},
        "tokenizer": describe_tokenizer(BytesTokenizer()),
        "dtype": "<u2",
        "block_tokens": block,
        "shard_tokens": SHARD_TOKENS,
        "splits": {"train": none | {"documents": documents, "shards": shards}, "validation": none},
        "sources": [],
    }
    (directory / MANIFEST).write_text(json.dumps(add_digest(manifest)))


def _write_shard(
    directory: Path, number: int, edges: np.ndarray, real_tokens: bool
) -> dict[str, Any]:
    begin, size, name = number * SHARD_TOKENS, int(edges[-1]), f"train-{number:05d}"
    entries = np.append(begin - 1, begin + edges[:-1]).astype("<i8")
    if real_tokens:
        tokens = np.random.default_rng(number).integers(3, 259, size).astype("<u2")
        tokens.tofile(directory / f"{name}.tokens")
        rows = index_rows(tokens, entries, begin, BLOCK_TOKENS)
    else:
        with (directory / f"{name}.tokens").open("wb") as stream:
            stream.truncate(2 * size)
        if size not in _ROWS:
            _ROWS[size] = index_rows(np.zeros(size, "<u2"), entries, begin, BLOCK_TOKENS)
        rows, data = _ROWS[size].copy(), entries.tobytes()
        bounds = zip(rows["first_start"].tolist(), rows["num_starts"].tolist(), strict=True)
        rows["starts_crc"] = [zlib.crc32(data[8 * a : 8 * (a + n)]) for a, n in bounds]
    (directory / f"{name}.index").write_bytes(rows.tobytes() + entries.tobytes())
    (directory / f"{name}.documents.npz").touch()
    count = len(edges) - 1
    return {
        "file": f"{name}.tokens",
        "tokens": size,
        "sha256": "0" * 64,
        "index": {"file": f"{name}.index", "sha256": "0" * 64},
        "documents": {"file": f"{name}.documents.npz", "count": count, "sha256": "0" * 64},
    }


_ROWS: dict[int, np.ndarray] = {}


def measure(directory: Path, processes: int, packing: Packing) -> dict[str, Any]:
    """Seconds and MB of opening the store in ``directory`` and of reading as one process does."""
    require("grain", "train")  # its import is no part of a store
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    manifest = read_manifest(directory)
    assert manifest is not None
    cache = make_cache(directory, manifest, "train")
    opened = time.perf_counter()
    rows = np.arange(BATCH_SIZE // processes)
    loader = Loader(cache, length=LENGTH, batch_size=BATCH_SIZE, seed=0, rows=rows, packing=packing)
    loader.batch(0)
    first = time.perf_counter()
    seconds = []
    for step in range(1, 1 + STEPS):
        start = time.process_time()
        loader.batch(step)
        seconds.append(time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "documents": cache.num_documents,
        "tokens": cache.num_tokens,
        "open": opened - began,
        "first": first - opened,
        "later": float(np.median(seconds)),
        "megabytes": grown / 1e3,
    }


def show_opening(documents: list[float], processes: int, packing: Packing, scratch: Path | None):
    print(
        "| store | documents | tokens | open, s | memory, MB | first batch, s | ms of CPU a batch |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in map(int, documents):
        for name, write in (("before", simulate_before), ("now", simulate)):
            if write is simulate_before and count > MOST_BEFORE:
                print(f"| before | {count:,} | | does not fit into memory | | | |")
                continue
            directory = Path(tempfile.mkdtemp(dir=scratch))
            try:
                write(directory, count)
                command = [sys.executable, "-m", "benchmarks.token_store", "read", str(directory)]
                command += ["--processes", str(processes), "--packing", packing]
                found = json.loads(subprocess.check_output(command))
            finally:
                shutil.rmtree(directory)
            print(
                "| {name} | {documents:,} | {tokens:,} | {open:.3f} | {megabytes:.0f} |"
                " {first:.3f} | {ms:.1f} |".format(name=name, ms=1e3 * found["later"], **found),
                flush=True,
            )


def show_builds(
    documents: list[float], workers: list[int], scratch: Path | None, text: Path | None
) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # else one worker's tokenizer uses every core
    print(
        f"| documents | tokens | workers | tokens/s on {len(available_cores())} cores"
        " | beside one tokenizer times the workers | beside as many tokenizers at once"
        " | tokens per s of CPU | beside the tokenizer's | s of CPU of the main process |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in map(int, documents):
        with _directory_of_text(count, scratch, text) as directory:
            tokenizer = _write_text(directory, count)
            one = rate_alone(directory, 1)
            for number in workers:
                # Before and after: other programs may come and go on the machine.
                alone = [rate_alone(directory, number)]
                with tempfile.TemporaryDirectory(dir=scratch) as cache_dir:
                    row = _time_build(directory, tokenizer, cache_dir, number)
                alone.append(rate_alone(directory, number))
                rate, cpu_rate = np.mean(alone, axis=0)
                print(
                    f"| {row['documents']:,} | {row['tokens']:,} | {number} | {row['rate']:,.0f}"
                    f" | {row['rate'] / (number * one[0]):.0%} of {number} x {one[0]:,.0f}"
                    f" | {row['rate'] / rate:.0%} of {rate:,.0f} | {row['cpu_rate']:,.0f}"
                    f" | {row['cpu_rate'] / cpu_rate:.0%} of {cpu_rate:,.0f} | {row['main']:.1f} |",
                    flush=True,
                )


@contextlib.contextmanager
def _directory_of_text(count: int, scratch: Path | None, text: Path | None) -> Iterator[Path]:
    """A directory for so many documents: one of ``text`` stays, another is deleted afterwards."""
    if text:
        yield text / str(count)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        yield Path(directory)


def _time_build(directory: Path, tokenizer: Path, cache_dir: str, workers: int) -> dict[str, Any]:
    """``rate`` and ``cpu_rate``, tokens of a second and of a second of CPU, of all processes."""
    config = _config(directory, tokenizer, cache_dir)
    before, began = _cpu(), time.perf_counter()
    cache = build.build(config, workers=workers)["train"]
    seconds, (main, pool) = time.perf_counter() - began, np.subtract(_cpu(), before)
    return {
        "documents": cache.num_documents,
        "tokens": cache.num_tokens,
        "rate": cache.num_tokens / seconds,
        "cpu_rate": cache.num_tokens / (main + pool),
        "main": main,
    }


def _config(directory: Path, tokenizer: Path, cache_dir: str) -> DataConfig:
    return DataConfig(
        corpus="text",
        train_files=(f"{directory}/train-*.jsonl",),
        validation_files=(f"{directory}/held.jsonl",),
        tokenizer=str(tokenizer),
        cache_dir=cache_dir,
    )


def rate_alone(directory: Path, processes: int) -> tuple[float, float]:
    """Tokens/s of so many processes at once that only tokenize, and per s of CPU of each."""
    command = [sys.executable, "-m", "benchmarks.token_store", "encode", str(directory)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for one in running:
        assert one.stdout and one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin
        one.stdin.write("\n")
        one.stdin.flush()
    rates = np.array([json.loads(one.communicate()[0]) for one in running])
    return float(rates[:, 0].sum()), float(rates[:, 1].mean())


def encode_alone(directory: Path) -> tuple[float, float]:
    """Tokens of the library's tokenizer, one thread, in a second and in one of CPU.

    It is given groups of texts in memory, as a build makes them, once a line has been read.
    """
    tokenizer = require("tokenizers", "train").Tokenizer.from_file(str(directory / TOKENIZER))
    documents = (one for path in sorted(directory.glob("train-*")) for one in read_file(path))
    groups = list(group_documents(itertools.islice(documents, MOST_ALONE)))
    texts = [[document.text for document in group] for group in groups]
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for group in texts:
        encoded = tokenizer.encode_batch_fast(group, add_special_tokens=False)
        tokens += sum(len(one.ids) for one in encoded)
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def show_share(documents: list[float], scratch: Path | None, text: Path | None) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    print("| documents | what | s of CPU | of which in the tokenizer |")
    print("|---|---|---|---|")
    for count in map(int, documents):
        with _directory_of_text(count, scratch, text) as directory:
            path = _write_text(directory, count)
            with tempfile.TemporaryDirectory(dir=scratch) as cache_dir:
                config = _config(directory, path, cache_dir)
                for what, run in (("a build in one process", build.build), ("a worker", _work)):
                    seconds, inside = _seconds_inside(functools.partial(run, config, workers=1))
                    share = f"{inside:.2f} ({inside / seconds:.1%})"
                    print(f"| {count:,} | {what} | {seconds:.2f} | {share} |", flush=True)


def _work(config: DataConfig, workers: int) -> None:
    """What the ``workers`` of a build do, in this process instead."""
    tokenizer = JsonTokenizer.load(Path(config.tokenizer))
    for part in list_parts(config, config.corpus, "train", list_sources(config, [])):
        output = f"{config.cache_dir}/parts/{part.number}"
        save_part(config, lambda: tokenizer, part, output)


def _seconds_inside(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU of ``run``, and of those inside the library's tokenizer."""
    inside, real = [0.0], JsonTokenizer._encode_raw

    def timed(tokenizer: JsonTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        began = time.process_time()
        tokens = real(tokenizer, texts)
        inside[0] += time.process_time() - began
        return tokens

    began = time.process_time()
    with mock.patch.object(JsonTokenizer, "_encode_raw", timed):
        run()
    return time.process_time() - began, inside[0]


def _cpu() -> tuple[float, float]:
    """Seconds of this process, and of its children that have ended."""
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


def _write_text(directory: Path, documents: int) -> Path:
    """Documents of random words, frequent and rare, in 8 files, and a tokenizer of them, once."""
    path = directory / TOKENIZER
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 10, 20_000)]
    cumulative = np.cumsum(1 / np.arange(3, 20_003))
    cumulative /= cumulative[-1]
    for name, count in (*((f"train-{i}", documents // 8) for i in range(8)), ("held", 10)):
        sizes = rng.integers(80, 480, count)
        with (directory / f"{name}.jsonl").open("w") as stream:
            for some in np.array_split(sizes, 1 + count // 1000):
                drawn = np.searchsorted(cumulative, rng.random(some.sum()), side="right")
                for chosen in np.split(drawn, np.cumsum(some)[:-1]):
                    text = " ".join([words[i] for i in chosen.tolist()])
                    stream.write(json.dumps({"text": text}) + "\n")
    tokenizer = require("tokenizers", "train").ByteLevelBPETokenizer()
    lines = (json.loads(line)["text"] for line in (directory / "train-0.jsonl").open())
    tokenizer.train_from_iterator(
        (text for text, _ in zip(lines, range(2000), strict=False)),
        vocab_size=4096,
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.save(str(path))
    return path


def show_processes(
    documents: float, counts: list[int], packing: Packing, scratch: Path | None
) -> None:
    """Bytes that each of several processes reads a step, and whether its rows are those of one."""
    read, real = [0], LocalFiles.read

    def counted(files: LocalFiles, file: str, begin: int, end: int) -> bytes:
        data = real(files, file, begin, end)
        read[0] += len(data)
        return data

    directory = Path(tempfile.mkdtemp(dir=scratch))
    fields: dict[str, Any] = {"length": LENGTH, "batch_size": BATCH_SIZE, "seed": 0}
    fields["packing"] = packing
    print("| processes | rows of each | KB a process reads a step | its rows are those of one |")
    print("|---|---|---|---|")
    try:
        simulate(directory, int(documents), real_tokens=True)
        manifest = read_manifest(directory)
        assert manifest is not None
        cache = make_cache(directory, manifest, "train")
        whole = [Loader(cache, **fields).batch(step) for step in range(3)]
        for count in counts:
            most, equal = 0, True
            for rows in np.split(np.arange(BATCH_SIZE), count):
                loader = Loader(cache, **fields, rows=rows)
                for step, batch in enumerate(whole):
                    read[0] = 0
                    with mock.patch.object(LocalFiles, "read", counted):
                        found = loader.batch(step)
                    most = max(most, read[0])
                    pairs = zip(found, batch, strict=True)
                    equal &= all(np.array_equal(a[rows], b[rows]) for a, b in pairs)
            line = f"| {count} | {BATCH_SIZE // count} | {most / 1e3:,.0f} |"
            print(f"{line} {'yes' if equal else 'NO'} |", flush=True)
    finally:
        shutil.rmtree(directory)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--scratch", type=Path, help="where stores are written and removed")
    packing = {"choices": ("documents", "windows"), "default": "windows"}
    one = verbs.add_parser("open", parents=[common], help="memory and time to open and to read")
    one.add_argument("--documents", type=float, nargs="+", default=[1e4, 1e6])
    one.add_argument("--processes", type=int, default=4, help="that share a batch of 1,024 rows")
    one.add_argument("--packing", **packing)
    one = verbs.add_parser("build", parents=[common], help="tokens a second")
    one.add_argument("--documents", type=float, nargs="+", default=[1e4])
    one.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    one.add_argument("--text", type=Path, help="where the text is kept, for the next time")
    one = verbs.add_parser("share", parents=[common], help="of the CPU, inside the tokenizer")
    one.add_argument("--documents", type=float, nargs="+", default=[2e4])
    one.add_argument("--text", type=Path, help="where the text is kept, for the next time")
    one = verbs.add_parser("processes", parents=[common], help="bytes and rows of each process")
    one.add_argument("--documents", type=float, default=1e5)
    one.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 16])
    one.add_argument("--packing", **packing)
    one = verbs.add_parser("encode")  # text that `build` wrote
    one.add_argument("directory", type=Path)
    one = verbs.add_parser("read")  # a store that `open` wrote
    one.add_argument("directory", type=Path)
    one.add_argument("--processes", type=int, default=4)
    one.add_argument("--packing", **packing)
    arguments = parser.parse_args(argv)
    if arguments.verb == "read":
        print(json.dumps(measure(arguments.directory, arguments.processes, arguments.packing)))
    elif arguments.verb == "open":
        show_opening(arguments.documents, arguments.processes, arguments.packing, arguments.scratch)
    elif arguments.verb == "share":
        show_share(arguments.documents, arguments.scratch, arguments.text)
    elif arguments.verb == "encode":
        print(json.dumps(encode_alone(arguments.directory)))
    elif arguments.verb == "build":
        show_builds(arguments.documents, arguments.workers, arguments.scratch, arguments.text)
    else:
        show_processes(
            arguments.documents, arguments.processes, arguments.packing, arguments.scratch
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
