"""The token cache gives back the stream it was given, or names the file that is damaged."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fope_jax.data import DataConfig, build, cache, cache_reader, corpora
from fope_jax.data.cache import CacheError
from fope_jax.data.cache_directories import cache_directory, partial_directory
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.cache_writer import Progress, SplitWriter
from fope_jax.data.documents import TokenizedDocuments
from fope_jax.data.loader import Loader
from fope_jax.data.manifest import read_manifest, shard_files
from fope_jax.data.tokenizers import BytesTokenizer, describe_tokenizer

BLOCK, SHARD = 16, 64
BYTES = BytesTokenizer()


class Document(NamedTuple):
    name: str
    tokens: np.ndarray
    bytes: int


def make_documents(sizes):
    """Documents of the sizes given, of bytes that differ, each with EOS; size 0 has no text."""
    rng = np.random.default_rng(0)
    ends = [np.append(rng.integers(3, 259, n), BYTES.eos_id).astype(np.int32) for n in sizes]
    return [Document(f"doc{i}", x, n) for i, (x, n) in enumerate(zip(ends, sizes, strict=True))]


def grouped(documents, size, corpus="text"):
    """The documents in groups of ``size``, as a build tokenizes them."""
    for group in (documents[i : i + size] for i in range(0, len(documents), size)):
        yield TokenizedDocuments(
            corpus,
            [d.name for d in group],
            np.concatenate([d.tokens for d in group]),
            np.array([len(d.tokens) for d in group], np.int64),
            np.array([d.bytes for d in group], np.int64),
            [""] * len(group),
            np.zeros(len(group), bool),
        )


def write(directory, documents, progress=None, stop=None, block=BLOCK, shard=SHARD, group=3):
    """Writes documents as the build does; returns the progress saved at each complete shard."""
    saved = []
    progress = progress or Progress()
    skip = sum(progress.documents.values())
    writer = SplitWriter(
        directory,
        "train",
        token_bytes=BYTES.token_bytes,
        progress=progress,
        save=lambda now: saved.append(
            dataclasses.replace(now, documents=dict(now.documents), tokens=dict(now.tokens))
        ),
        block_tokens=block,
        shard_tokens=shard,
    )
    for documents_ in grouped(documents[skip:stop], group):
        writer.add(documents_)
    if stop is None:
        saved.append(writer.finish())
    return saved


def read(directory, progress, block=BLOCK, shard=SHARD):
    manifest = {
        "fingerprint": "f",
        "tokenizer": describe_tokenizer(BYTES),
        "dtype": "<u2",
        "block_tokens": block,
        "shard_tokens": shard,
        "splits": {"train": {"shards": progress.shards}},
    }
    return TokenCache(directory, manifest, "train")


SIZES = [0, 5, 200, 1, 62, 63, 0, 64, 30, 127, 17]


def test_tokens_in_are_tokens_out(tmp_path):
    documents = make_documents(SIZES)
    progress = write(tmp_path, documents)[-1]
    found = read(tmp_path, progress)
    stream = np.concatenate([d.tokens for d in documents if d.bytes])
    assert found.num_tokens == len(stream) == sum(SIZES) + len([n for n in SIZES if n])
    np.testing.assert_array_equal(found.tokens(0, found.num_tokens), stream)
    assert found.tokens(0, 1).dtype == np.int32
    rng = np.random.default_rng(1)
    for start, stop in np.sort(rng.integers(0, len(stream) + 1, (200, 2))):
        np.testing.assert_array_equal(found.tokens(start, stop), stream[start:stop])
    assert progress.empty_documents == 2 and progress.changed_documents == 0
    assert progress.bytes == sum(SIZES)


def test_documents_name_every_part_of_the_stream(tmp_path):
    documents = make_documents(SIZES)
    found = read(tmp_path, write(tmp_path, documents)[-1])
    kept = [d for d in documents if d.bytes]
    table = found.documents
    assert table["name"].tolist() == [d.name for d in kept]
    assert table["bytes"].tolist() == [d.bytes for d in kept]
    for row, document in zip(table, kept, strict=True):
        np.testing.assert_array_equal(
            found.tokens(row["start"], row["start"] + row["length"]), document.tokens
        )
    assert int((table["start"] + table["length"])[-1]) == found.num_tokens


@pytest.mark.parametrize("group", [1, 4, 11])
def test_groups_of_any_size_give_the_same_files(tmp_path, group):
    for name, size in (("one", 1), ("many", group)):
        (tmp_path / name).mkdir()
        steps = write(tmp_path / name, make_documents(SIZES), group=size)
        if name == "one":
            expected = steps
    assert steps == expected


@pytest.mark.parametrize("block", [4, 16, 64])
def test_starts_of_the_documents_of_any_tokens(tmp_path, block):
    """Against a plain loop; documents that end with a shard, and longer than several."""
    sizes = [63, 5, 200, 1, 62, 0, 63, 64, 30, 127, 17]
    found = read(tmp_path, write(tmp_path, make_documents(sizes), block=block)[-1], block=block)
    starts = np.cumsum([0, *(n + 1 for n in sizes if n)])[:-1]
    assert found.num_documents == len(starts)
    spans = np.sort(np.random.default_rng(1).integers(0, found.num_tokens + 1, (300, 2)))
    for start, stop in [*spans.tolist(), (0, found.num_tokens), (64, 128), (64, 65), (63, 64)]:
        if start == stop:
            continue
        number = int((starts <= start).sum()) - 1
        first, inside = found.document_starts(start, stop)
        assert first == number
        assert inside.tolist() == [starts[number], *(s for s in starts if start < s < stop)]
    assert [found.document_name(n) for n in range(10)] == found.documents["name"].tolist()
    with pytest.raises(IndexError, match="at least one token"):
        found.document_starts(3, 3)


def test_opening_reads_nothing_but_the_manifest(tmp_path, monkeypatch):
    """Windows are read in three short pieces, whatever else the shard holds."""
    progress = write(tmp_path, make_documents([40] * 300), block=16, shard=64 * 16)[-1]
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: sizes.append(n) or pread(f, n, at))
    monkeypatch.setattr(cache_reader, "file_sha256", None)
    found = read(tmp_path, progress, block=16, shard=64 * 16)
    assert found.num_tokens == 41 * 300 and found.num_documents == 300 and not sizes
    found.tokens(5000, 5016), found.document_starts(5000, 5016)
    assert len(sizes) == 4 and sum(sizes) < 300


@pytest.mark.parametrize("sizes", [SIZES, [63, 63, 127, 10], [64 * 5], [63]])
def test_going_on_after_any_shard_gives_the_same_files(tmp_path, sizes):
    documents = make_documents(sizes)
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = write(whole, documents)
    assert len(steps) >= 1
    for i, step in enumerate(steps[:-1]):
        other = tmp_path / f"from{i}"
        other.mkdir()
        for shard in step.shards:
            for file in (entry["file"] for entry in shard_files(shard)):
                (other / file).write_bytes((whole / file).read_bytes())
        step = Progress(**json.loads(json.dumps(dataclasses.asdict(step))))
        resumed = write(other, documents, progress=step, group=1 + i)[-1]
        assert resumed == steps[-1]  # sums and every sha256
        assert {p.name for p in other.iterdir()} == {p.name for p in whole.iterdir()}


def test_documents_that_the_tokenizer_changes_are_counted(tmp_path):
    documents = make_documents([10, 20])
    documents[1] = documents[1]._replace(bytes=19)
    assert write(tmp_path, documents)[-1].changed_documents == 1


def test_pointers_in_place_of_the_files_of_a_cache_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    found = read(tmp_path, write(tmp_path, make_documents(SIZES))[-1])
    (tmp_path / "train-00000.tokens").write_bytes(pointer)
    with pytest.raises(CacheError, match=r"damaged: it is a Git LFS pointer.*`git lfs pull`$"):
        found.tokens(0, 1)
    (tmp_path / "manifest.json").write_bytes(pointer)
    with pytest.raises(CacheError, match=r"damaged: it is a Git LFS pointer.*`git lfs pull`$"):
        read_manifest(tmp_path)


def test_large_vocabularies_are_stored_in_more_bytes():
    assert cache_reader.token_dtype(65_536) == np.uint16
    assert cache_reader.token_dtype(65_537) == np.int32


@pytest.mark.parametrize("span", [(-1, 3), (5, 4), (0, 10**6)])
def test_tokens_outside_the_stream(tmp_path, span):
    found = read(tmp_path, write(tmp_path, make_documents([40]))[-1])
    with pytest.raises(IndexError, match=r"within \[0, 41\]"):
        found.tokens(*span)
    assert found.tokens(41, 41).shape == (0,)


def test_many_threads_read_the_same(tmp_path):
    documents = make_documents([997])
    found = read(tmp_path, write(tmp_path, documents)[-1])
    spans = np.sort(np.random.default_rng(2).integers(0, 998, (400, 2)))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda s: found.tokens(*s), spans))
    for (start, stop), result in zip(spans, results, strict=True):
        np.testing.assert_array_equal(result, documents[0].tokens[start:stop])


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", ["tokens", "index", "documents.npz"])
def test_one_flipped_bit_is_found_and_its_file_named(tmp_path, suffix):
    progress = write(tmp_path, make_documents([300]))[-1]
    path = tmp_path / f"train-00002.{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    found = read(tmp_path, progress)
    message = rf"train-00002\.{suffix} is damaged: sha256 .*fope data build"
    with pytest.raises(CacheError, match=message):
        found.verify()
    with pytest.raises(CacheError, match=message):
        found.tokens(0, 301) if suffix == "tokens" else found.documents
    assert len(found.tokens(0, 128)) == 128  # the other shards are whole


@pytest.mark.parametrize("suffix", ["tokens", "index"])
def test_every_flipped_bit_is_found_by_whoever_reads_there(tmp_path, suffix):
    """Also while the cache is open: nothing that was checked once is trusted later."""
    found = read(tmp_path, write(tmp_path, make_documents([9, 30, 1, 22]))[-1])
    path = tmp_path / f"train-00000.{suffix}"
    content, wanted = path.read_bytes(), (found.tokens(0, 64), found.document_starts(0, 64)[1])
    for byte in range(len(content)):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 32]) + content[byte + 1 :])
        try:
            tokens, starts = found.tokens(0, 64), found.document_starts(0, 64)[1]
        except CacheError as error:
            assert f"train-00000.{suffix} is damaged: sha256" in str(error)
        else:  # a start before the first document, a count that is not used
            assert suffix == "index"
            np.testing.assert_array_equal(tokens, wanted[0])
            np.testing.assert_array_equal(starts, wanted[1])


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Nobody shall delete a cache because too many files are open."""
    cache = read(tmp_path, write(tmp_path, make_documents([300]))[-1])

    def fail(*arguments):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(cache._files, "read", fail)
    with pytest.raises(CacheError, match="cannot be read: .*Too many open files$"):
        cache.tokens(64, 128)


def test_a_shard_cut_short_and_one_that_is_gone(tmp_path):
    progress = write(tmp_path, make_documents([300]))[-1]
    path = tmp_path / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CacheError, match=r"train-00001\.tokens is damaged"):
        read(tmp_path, progress).tokens(64, 128)
    path.unlink()
    with pytest.raises(CacheError, match=r"train-00001\.tokens is missing"):
        read(tmp_path, progress)


def test_a_damaged_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


# ---------------------------------------------------------------------------- opening


def test_a_cache_that_is_not_there_names_the_command(text_config):
    config = text_config()
    with pytest.raises(CacheError, match=r"no token cache of corpus 'text'.*fope data build"):
        cache.open_cache(config, "train")
    partial_directory(cache_directory(config)).mkdir(parents=True)
    with pytest.raises(CacheError, match="it has been begun"):
        cache.open_cache(config, "train")
    with pytest.raises(ValueError, match=r"split 'test'.*validation"):
        cache.open_cache(config, "test")


def test_only_what_decides_the_tokens_decides_the_directory(text_config):
    one = cache_directory(text_config())
    assert cache_directory(text_config(packing="windows")) == one
    assert cache_directory(text_config(vocab_size=100)) == one  # bytes have their own number
    books = text_config(corpus="gutenberg", train_files=(), validation_files=())
    others = [
        text_config(tokenizer="sentencepiece"),
        text_config(tokenizer="sentencepiece", vocab_size=300),
        text_config(train_files=("a.txt",)),
        books,
        dataclasses.replace(books, excluded_books=("bible-kjv",)),
        text_config(corpus="c4", train_files=(), validation_files=(), tfds_data_dir="d"),
        text_config(corpus="mixture", mixture=("text=1", "gutenberg=1")),
        text_config(corpus="mixture", mixture=("text=1", "gutenberg=2")),
    ]
    assert len({one, *map(cache_directory, others)}) == len(others) + 1


def test_reading_a_cache_needs_no_tensorflow(text_config):
    config = text_config()
    build.build(config)
    code = (
        "import sys; from fope_jax.data import DataConfig;"
        "from fope_jax.data.cache import open_cache;"
        f"c = open_cache({config!r}, 'train');"
        "text = c.tokenizer.decode(c.tokens(0, c.num_tokens)); c.documents; c.verify();"
        "print(len(text), sorted({'tensorflow', 'jax', 'seqio'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = sum(len(d.text) for d in corpora.read_corpus(config, "text", "train"))
    assert out.stdout.split(maxsplit=1) == [str(size), "[]\n"]


# ---------------------------------------------------------------------------- older versions


@pytest.fixture
def old_cache(tmp_path, monkeypatch):
    """A cache of ArrayRecord files, and what older code read of it; see goldens/README.md."""
    with tarfile.open(Path(__file__).parents[1] / "goldens" / "old_token_cache.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    config = DataConfig(
        corpus="text",
        train_files=("text/train*.txt",),
        validation_files=("text/held*.txt",),
        tokenizer="bytes",
        cache_dir="cache",
    )
    with np.load("expected.npz") as expected:
        return config, dict(expected)


def test_a_cache_of_an_older_version_is_read_as_it_was(old_cache):
    config, expected = old_cache
    for split in ("train", "validation"):
        found = cache.open_cache(config, split)
        found.verify()
        table = found.documents
        for name in ("start", "length", "bytes", "name"):
            assert table[name].tolist() == expected[f"{split}_{name}"].tolist()
        tokens = expected[f"{split}_tokens"]
        np.testing.assert_array_equal(found.tokens(0, len(tokens)), tokens)
        np.testing.assert_array_equal(found.tokens(100, 500), tokens[100:500])
        for number, (start, length) in enumerate(zip(table["start"], table["length"], strict=True)):
            first, starts = found.document_starts(start, start + length)
            assert (first, starts.tolist()) == (number, [start])
            assert found.document_name(number) == table["name"][number]
    path = next(Path("cache").glob("*/train-00003.array_record"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=r"train-00003\.array_record is damaged: sha256"):
        cache.open_cache(config, "train").tokens(3 * 512, 3 * 512 + 1)


def test_batches_of_an_older_cache_are_those_of_a_new_one_of_its_text(old_cache, tmp_path):
    config, expected = old_cache
    names, starts = (expected[f"train_{key}"] for key in ("name", "start"))
    ends = starts + expected["train_length"] - 1  # without EOS
    for name, start, end in zip(names.tolist(), starts, ends, strict=True):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(BYTES.decode(expected["train_tokens"][start:end]))
    for i, start in enumerate(expected["validation_start"]):
        size = expected["validation_length"][i] - 1
        tokens = expected["validation_tokens"][start : start + size]
        Path(f"text/held{i}.txt").write_text(BYTES.decode(tokens))
    new = build.build(dataclasses.replace(config, cache_dir="new"))["train"]
    old = cache.open_cache(config, "train")
    for packing in ("documents", "windows"):
        pair = [
            Loader(one, length=48, batch_size=3, seed=1, packing=packing, window=96)
            for one in (old, new)
        ]
        for step in (0, 5, 30):
            for a, b in zip(*(loader.batch(step) for loader in pair), strict=True):
                np.testing.assert_array_equal(a, b)
