"""Time and memory to open a token store and to read batches of it, for any number of documents.

    python -m benchmarks.token_store --documents 1e4 1e6 365e6

The stores are simulated: their indices are real, of documents like C4's (430 tokens on average),
and their tokens are zeros in sparse files, which take no room on a disk. The index takes 10 bytes a
document: 3.5 GB for all of C4. Each store is opened in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data.cache import BLOCK_TOKENS, SHARD_TOKENS, make_cache
from fope_jax.data.cache_writer import index_rows
from fope_jax.data.loader import Loader
from fope_jax.data.manifest import MANIFEST, add_digest, read_manifest
from fope_jax.data.tokenizers import BytesTokenizer, describe_tokenizer

LENGTH, BATCH_SIZE = 512, 1024


def simulate(directory: Path, documents: int) -> None:
    """Writes a store whose training split has so many documents."""
    lengths = np.random.default_rng(0).integers(100, 761, SHARD_TOKENS // 100)
    lengths = lengths[np.cumsum(lengths) <= SHARD_TOKENS]
    lengths[-1] += SHARD_TOKENS - lengths.sum()  # every shard begins with a document
    starts = np.cumsum(lengths) - lengths
    shards, left = [], documents
    while left > 0:
        number, count = len(shards), min(left, len(lengths))
        size = int(starts[count - 1] + lengths[count - 1])
        shards.append(_write_shard(directory, number, starts[:count], size))
        left -= count
    none = {"documents": 0, "bytes": 0, "empty_documents": 0, "changed_documents": 0, "shards": []}
    manifest = {
        "fingerprint": "0" * 64,
        "content": "0" * 64,
        "config": {},
        "tokenizer": describe_tokenizer(BytesTokenizer()),
        "dtype": "<u2",
        "block_tokens": BLOCK_TOKENS,
        "shard_tokens": SHARD_TOKENS,
        "splits": {"train": none | {"documents": documents, "shards": shards}, "validation": none},
        "sources": [],
    }
    (directory / MANIFEST).write_text(json.dumps(add_digest(manifest)))


def _write_shard(directory: Path, number: int, starts: np.ndarray, size: int) -> dict[str, Any]:
    begin, name = number * SHARD_TOKENS, f"train-{number:05d}"
    with (directory / f"{name}.tokens").open("wb") as stream:
        stream.truncate(2 * size)
    entries = np.append(begin - 1, begin + starts).astype("<i8")
    rows = _ROWS.get(size)
    if rows is None:
        rows = _ROWS[size] = index_rows(np.zeros(size, "<u2"), entries, begin, BLOCK_TOKENS)
    rows = rows.copy()
    data = entries.tobytes()
    bounds = zip(rows["first_start"].tolist(), rows["num_starts"].tolist(), strict=True)
    rows["starts_crc"] = [zlib.crc32(data[8 * a : 8 * (a + n)]) for a, n in bounds]
    (directory / f"{name}.index").write_bytes(rows.tobytes() + entries.tobytes())
    (directory / f"{name}.documents.npz").touch()
    return {
        "file": f"{name}.tokens",
        "tokens": size,
        "sha256": "0" * 64,
        "index": {"file": f"{name}.index", "sha256": "0" * 64},
        "documents": {"file": f"{name}.documents.npz", "count": len(starts), "sha256": "0" * 64},
    }


_ROWS: dict[int, np.ndarray] = {}


def measure(directory: Path, processes: int) -> dict[str, Any]:
    """Seconds and MB of opening the store in ``directory`` and of reading as one process does."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    manifest = read_manifest(directory)
    assert manifest is not None
    cache = make_cache(directory, manifest, "train")
    opened = time.perf_counter()
    rows = np.arange(BATCH_SIZE // processes)
    loader = Loader(cache, length=LENGTH, batch_size=BATCH_SIZE, seed=0, rows=rows)
    loader.batch(0)
    first, steps = time.perf_counter(), 20
    for step in range(1, 1 + steps):
        loader.batch(step)
    later = time.perf_counter()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "documents": cache.num_documents,
        "tokens": cache.num_tokens,
        "open": opened - began,
        "first": first - opened,
        "later": (later - first) / steps,
        "megabytes": grown / 1e3,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--documents", type=float, nargs="+", default=[1e4, 1e6])
    parser.add_argument("--processes", type=int, default=4, help="that share a batch of 1,024 rows")
    parser.add_argument("--scratch", type=Path, help="where the stores are written and removed")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.read:
        print(json.dumps(measure(arguments.read, arguments.processes)))
        return 0
    print("| documents | tokens | open, s | memory, MB | first batch, s | a batch, ms |")
    print("|---|---|---|---|---|---|")
    for documents in arguments.documents:
        directory = Path(tempfile.mkdtemp(dir=arguments.scratch))
        try:
            simulate(directory, int(documents))
            command = [sys.executable, "-m", "benchmarks.token_store", "--read", str(directory)]
            command += ["--processes", str(arguments.processes)]
            found = json.loads(subprocess.check_output(command))
        finally:
            shutil.rmtree(directory)
        print(
            "| {documents:,} | {tokens:,} | {open:.3f} | {megabytes:.0f} | {first:.2f} |"
            " {milliseconds:.0f} |".format(**found, milliseconds=1e3 * found["later"]),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
