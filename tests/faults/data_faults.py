"""Bad text and damaged token caches: what is promised of each, and a trial of the promise.

A trial breaks something at a place that its seed draws, and raises AssertionError where it is not
found, not named, or where what is left is not what it should be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fope_jax.data import DataConfig
from fope_jax.data.build import build
from fope_jax.data.cache import open_cache
from fope_jax.data.cache_directories import cache_directory
from fope_jax.data.config import SPLITS
from fope_jax.data.corpora import LONGEST_DOCUMENT, CorpusError, read_file
from fope_jax.data.inspect_cache import inspect
from fope_jax.data.manifest import CacheError, shard_files
from fope_jax.data.tokenizers import TokenizerError
from tests.faults.fault import Fault

DOCUMENTS = 12
# Each is no document: a start byte without its rest, no JSON, no text, half a surrogate pair.
BAD_LINES = (
    b'{"text": "caf\xe9 "}',
    b'{"text": "cut off',
    b'["no object"]',
    b'{"body": "no text"}',
    b'{"text": 7}',
    b'{"text": "\\ud800"}',
    b"[" * 3000,
)


def lines(random_: random.Random, count: int = DOCUMENTS) -> list[bytes]:
    """Documents of a .jsonl file, in words that no other document has."""
    texts = ["".join(random_.choices("abcdefghij klmnop", k=60)) for _ in range(count)]
    return [json.dumps({"text": text}).encode() for text in texts]


def text_config(directory: Path, content: bytes, **fields: Any) -> DataConfig:
    """A corpus of one training file with ``content``, and one held-out file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.jsonl").write_bytes(content)
    (directory / "held.jsonl").write_bytes(b'{"text": "held out"}\n')
    return DataConfig(
        **{
            "corpus": "text",
            "train_files": (f"{directory}/train.jsonl",),
            "validation_files": (f"{directory}/held.jsonl",),
            "tokenizer": "bytes",
            "cache_dir": f"{directory}/cache",
        }
        | fields
    )


def quietly(work: Callable[[], Any]) -> str:
    """What ``work`` says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        work()
    return said.getvalue()


def error_of(work: Callable[[], Any], *kinds: type[Exception]) -> str:
    """The message of the error that ``work`` must raise."""
    try:
        quietly(work)
    except kinds as error:
        return str(error)
    raise AssertionError("nothing was raised")


def tokens_of(config: DataConfig) -> bytes:
    cache = open_cache(config, "train")
    return cache.tokens(0, cache.num_tokens).tobytes()


# ---------------------------------------------------------------------------- text


def bad_line(directory: Path, seed: int) -> None:
    """Strict stops at the line, naming offset; lenient counts it and gives the other documents."""
    draw = random.Random(seed)
    good = lines(draw)
    at, bad = draw.randrange(DOCUMENTS), draw.choice(BAD_LINES)
    broken = [*good[:at], bad, *good[at:]]
    offset = sum(len(line) + 1 for line in broken[:at])
    config = text_config(directory / "broken", b"\n".join(broken))
    message = error_of(lambda: build(config), CorpusError)
    inside = bad.find(b"\xe9") + 1
    place = f"at offset {offset + inside - 1} " if inside else f"begins at offset {offset}"
    assert "train.jsonl" in message and place in message, message
    lenient = text_config(directory / "broken", b"\n".join(broken), max_bad_documents=1)
    said = quietly(lambda: build(lenient))
    assert "train: 1 documents cannot be read and are left out" in said, said
    assert place in inspect(lenient)
    clean = text_config(directory / "clean", b"\n".join(good))
    quietly(lambda: build(clean))
    assert tokens_of(lenient) == tokens_of(clean)
    assert open_cache(lenient, "train").fingerprint != open_cache(clean, "train").fingerprint
    assert "max_bad_documents = 0" in error_of(lambda: open_cache(config, "train"), CacheError)


def too_many_bad(directory: Path, seed: int) -> None:
    """One bad document more than the budget stops the build and names each."""
    draw = random.Random(seed)
    budget = draw.randrange(1, 4)
    content = [*lines(draw), *draw.choices(BAD_LINES, k=budget + 1)]
    draw.shuffle(content)
    config = text_config(directory, b"\n".join(content), max_bad_documents=budget)
    message = error_of(lambda: build(config), CorpusError)
    assert f"{budget + 1} documents of the train split cannot be read" in message, message
    assert message.count("train.jsonl") == budget + 1, message
    assert not cache_directory(config).exists()


def long_line(directory: Path, seed: int) -> None:
    """A line beyond the limit is refused, or passed over, in bounded memory."""
    draw = random.Random(seed)
    path = directory / "a.jsonl"
    longest = LONGEST_DOCUMENT + draw.randrange(1, 2**24)
    with path.open("wb") as stream:
        stream.write(b'{"text": "before"}\n')
        stream.truncate(stream.tell() + longest)  # zeros that take no room on the disk
        stream.seek(0, 2)
        stream.write(b'\n{"text": "after"}\n')
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from fope_jax.data.corpora import read_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = list(read_file(Path(sys.argv[1]), skip_bad=True))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print([d.text for d in found], found[1].bad, grown // 1024, sep='|')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    texts, bad, megabytes = result.stdout.strip().split("|")
    assert texts == "['before', '', 'after']", texts
    assert bad.startswith(f"{path}:2 (offset 19) is a document of more than 134,217,728"), bad
    assert int(megabytes) < 3 * LONGEST_DOCUMENT / 2**20, megabytes
    assert error_of(lambda: list(read_file(path)), CorpusError) == bad


def alike_and_empty(directory: Path, seed: int) -> None:
    """Copies and empty files are named; one text in both splits stops the build."""
    draw = random.Random(seed)
    content = b"\n".join(lines(draw))
    config = text_config(
        directory,
        content,
        train_files=(f"{directory}/t*.jsonl",),
        validation_files=(f"{directory}/h*.jsonl",),
    )
    (directory / "train2.jsonl").write_bytes(content)
    (directory / "train3.jsonl").write_bytes(b"")
    said = quietly(lambda: build(config))
    for text in (said, inspect(config)):
        assert re.search(
            r"same content, which counts again, 1: \S+train2.jsonl \(as \S+/train.jso", text
        ), text
        assert re.search(r"train: empty files, 1: \S+train3.jsonl", text), text
    assert open_cache(config, "train").summary["documents"] == 2 * DOCUMENTS
    (directory / "held2.jsonl").write_bytes(content)
    message = error_of(lambda: build(config), CorpusError)
    assert "held2.jsonl has the same content as training file" in message, message


def damaged_gzip(directory: Path, seed: int) -> None:
    """Strict stops and names the file; lenient gives what the other files alone would give."""
    draw = random.Random(seed)
    packed = bytearray(gzip.compress(b"\n".join(lines(draw)), mtime=0))
    at = draw.randrange(len(packed))
    if draw.random() < 0.3:
        packed = packed[:at]
    else:
        packed[at] ^= 1 << draw.randrange(8)
    text = b"\n".join(lines(draw))
    config = text_config(directory, text, train_files=(f"{directory}/train.jsonl*",))
    (directory / "train.jsonl.gz").write_bytes(packed)
    try:  # a flip in the header's date or system, or in bits that only fill, changes nothing
        whole = gzip.decompress(packed) if packed else None
    except (OSError, EOFError, zlib.error):
        whole = None
    if whole is not None:
        quietly(lambda: build(config))
        assert open_cache(config, "train").summary["documents"] == 2 * DOCUMENTS
        return
    message = error_of(lambda: build(config), CorpusError)
    expected = f"{directory}/train.jsonl.gz is not a complete gzip file"
    assert expected in message and "max_damaged_files = 0" in message, message
    check_left_out(config, expected)
    alone = text_config(directory / "alone", text)
    quietly(lambda: build(alone))
    assert tokens_of(dataclasses.replace(config, max_damaged_files=1)) == tokens_of(alone)


def check_left_out(config: DataConfig, expected: str) -> None:
    """Builds without a damaged file, which is told; a strict configuration does not open that."""
    lenient = dataclasses.replace(config, max_damaged_files=1)
    said = quietly(lambda: build(lenient))
    for text in (said, inspect(lenient)):
        assert f"train: damaged files, left out, 1: {expected}" in text, text
    message = error_of(lambda: open_cache(config, "train"), CacheError)
    assert "lacks 1 train files that were damaged" in message and expected in message, message


def broken_tfrecord(directory: Path, seed: int) -> None:
    """File, record and offset are named, also of a file cut between records, before anything is
    read; lenient loses that file's documents and no other."""
    from tests.faults.tfds_files import prepare_c4, record_offsets, texts_of

    draw = random.Random(seed)
    splits = {
        split: [f"{split} page {number} " + "word " * number for number in range(count)]
        for split, count in (("train", 8), ("validation", 2))
    }
    config = DataConfig(
        corpus="c4",
        tfds_data_dir=str(prepare_c4(directory, splits, examples_per_file=3)),
        tokenizer="bytes",
        cache_dir=f"{directory}/cache",
    )
    files = sorted((directory / "tfds").rglob("c4-train.tfrecord*"))
    path = draw.choice(files)
    texts = [text for file in files if file != path for text in texts_of(file)]
    content, offsets = bytearray(path.read_bytes()), record_offsets(path)
    if draw.random() < 0.3:  # cut off between two records: TensorFlow sees nothing wrong
        path.write_bytes(content[: offsets[-1]])
        expected = f"{path} has {len(offsets) - 1} records; dataset_info.json says {len(offsets)}"
    else:
        at = draw.randrange(len(content))
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        record = max(number for number, offset in enumerate(offsets) if offset <= at)
        expected = (
            f"{path} is damaged: record {record} of {len(offsets)}, which begins at offset"
            f" {offsets[record]}:"
        )
    message = error_of(lambda: build(config), CorpusError)
    assert expected in message and "max_damaged_files = 0" in message, (message, expected)
    check_left_out(config, expected)
    cache = open_cache(dataclasses.replace(config, max_damaged_files=1), "train")
    found = cache.tokenizer.decode(cache.tokens(0, cache.num_tokens))
    assert len(found) == sum(map(len, texts)) and all(text in found for text in texts)


# ---------------------------------------------------------------------------- cache


@functools.cache
def whole_cache() -> dict[str, bytes]:
    """The files of a small cache with two shards, by name."""
    from fope_jax.data import cache as caches

    with tempfile.TemporaryDirectory() as scratch:
        text = b"\n".join(lines(random.Random(0), 200))
        config = text_config(Path(scratch) / "c", text, tokenizer="sentencepiece", vocab_size=300)
        sizes = caches.BLOCK_TOKENS, caches.SHARD_TOKENS
        caches.BLOCK_TOKENS, caches.SHARD_TOKENS = 256, 4096
        try:
            quietly(lambda: build(config))
        finally:
            caches.BLOCK_TOKENS, caches.SHARD_TOKENS = sizes
        directory = cache_directory(config)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def cache_in(directory: Path) -> tuple[DataConfig, Path]:
    """A copy of `whole_cache`, and the configuration that opens it."""
    config = text_config(directory, b"", tokenizer="sentencepiece", vocab_size=300)
    place = cache_directory(config)
    place.mkdir(parents=True)
    for name, content in whole_cache().items():
        (place / name).write_bytes(content)
    return config, place


def read_all(config: DataConfig) -> Iterator[bytes]:
    """Everything that training and evaluation read of a cache, as they read it."""
    for split in SPLITS:
        cache = open_cache(config, split)
        yield cache.tokens(0, cache.num_tokens).tobytes()
        yield repr(cache.documents.tolist()).encode()
        yield cache.tokenizer.fingerprint.encode()


def damaged_cache(directory: Path, seed: int) -> None:
    """Bits flipped, bytes cut off or a file gone: found when it is read, and the file named."""
    draw = random.Random(seed)
    config, place = cache_in(directory)
    assert len(list(place.glob("train-*.tokens"))) > 1
    path = draw.choice(sorted(place.iterdir()))
    content = bytearray(path.read_bytes())
    kind = draw.choice(("flip", "flip", "cut", "remove"))
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[: draw.randrange(len(content))]
    path.write_bytes(content) if kind != "remove" else path.unlink()
    message = error_of(lambda: list(read_all(config)), CacheError, TokenizerError)
    absent = kind == "remove" and path.name == "manifest.json"
    assert ("there is no token cache" if absent else path.name) in message, message


def damaged_after_opening(directory: Path, seed: int) -> None:
    """A shard damaged while it is open: its tokens are right, or the record is named."""
    draw = random.Random(seed)
    config, place = cache_in(directory)
    expected = next(read_all(config))
    cache = open_cache(config, "train")
    cache.tokens(0, 1)  # checks the first shard's hash
    path = place / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    for start in range(0, 4096, 256):
        try:
            found = cache.tokens(start, start + 256).tobytes()
        except CacheError as error:
            assert re.search(
                r"train-00000\.tokens is damaged: sha256 .*, in block \d+;", str(error)
            )
            continue
        assert found == expected[4 * start : 4 * (start + 256)], start


def added_shard(directory: Path, seed: int) -> None:
    """A file that the manifest does not name is never read."""
    config, place = cache_in(directory)
    before = list(read_all(config))
    extra = np.random.default_rng(seed).bytes(1000)
    (place / f"train-{seed % 7 + 10:05d}.tokens").write_bytes(extra)
    (place / "validation-00001.documents.npz").write_bytes(extra)
    assert list(read_all(config)) == before


OUTSIDE = (
    "../{name}",
    "/{path}",
    "..\\{name}",
    "a/../../{name}",
    "./{name}",
    "",
    "C:{name}",
    ".",
    "..",
    "a\0b",
    "{name}\n",
)


def hostile_manifest(directory: Path, seed: int) -> None:
    """A manifest that names files elsewhere, with their right hashes, is refused."""
    from fope_jax.data.manifest import add_digest

    draw = random.Random(seed)
    config, place = cache_in(directory)
    manifest = json.loads((place / "manifest.json").read_text())
    shard = draw.choice(manifest["splits"][draw.choice(SPLITS)]["shards"])
    entry = draw.choice(shard_files(shard))
    outside = place.parent / entry["file"]
    (place / entry["file"]).rename(outside)
    name = draw.choice(OUTSIDE).format(name=outside.name, path=outside)
    entry["file"] = name
    (place / "manifest.json").write_text(json.dumps(add_digest(manifest)))
    message = error_of(lambda: list(read_all(config)), CacheError)
    assert "accepted: a name in this directory" in message and repr(name)[:40] in message, message


FAULTS = [
    Fault(
        "bad line of text",
        "A line that is no document stops the build with file and offset; with max_bad_documents "
        "it is left out, counted, and changes the fingerprint.",
        bad_line,
        trials=60,
        short=3,
    ),
    Fault(
        "more bad documents than allowed",
        "One more than max_bad_documents stops the build and names them.",
        too_many_bad,
        trials=20,
        short=1,
    ),
    Fault(
        "line longer than a document may be",
        "It is refused by name or passed over, and memory stays below three times the limit.",
        long_line,
        trials=4,
        short=1,
    ),
    Fault(
        "empty and duplicate files",
        "They are named; the same text in both splits stops the build.",
        alike_and_empty,
        trials=10,
        short=1,
    ),
    Fault(
        "damaged .gz file",
        "The build stops before the first document and names it; with max_damaged_files it is left "
        "out whole, and the others give what they give alone.",
        damaged_gzip,
        trials=60,
        short=2,
    ),
    Fault(
        "broken TFRecord",
        "The build stops before the first document and names file, record and offset, also where a "
        "file ends early between two records; with max_damaged_files it is left out whole.",
        broken_tfrecord,
        trials=30,
        short=0,
    ),
    Fault(
        "token-cache file damaged",
        "A flipped bit, a cut or a missing file is found when it is read, and the file is named.",
        damaged_cache,
        trials=400,
        short=12,
    ),
    Fault(
        "token-cache shard damaged while it is open",
        "Tokens are those that were written, or the record is named.",
        damaged_after_opening,
        trials=60,
        short=3,
    ),
    Fault("file added to a token cache", "It is never read.", added_shard, trials=10, short=1),
    Fault(
        "token-cache manifest from a stranger",
        "A file outside the cache's directory is never opened.",
        hostile_manifest,
        trials=60,
        short=4,
    ),
]
