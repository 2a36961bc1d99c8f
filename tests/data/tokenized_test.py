"""However many processes tokenize, a cache has the same bytes, and goes on where it was."""

import dataclasses
import functools
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fope_jax.data import DataConfig, build, cache, corpora, parts, sources, tokenized
from fope_jax.data.beam import BeamWorkers, Runner
from fope_jax.data.build_state import BuildState
from fope_jax.data.cache_directories import cache_directory
from fope_jax.data.corpora import CorpusError
from fope_jax.data.tokenizers import BytesTokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A part for each file, and shards that several files fill."""
    monkeypatch.setattr(parts, "PART_BYTES", 0)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1024)


@pytest.fixture
def mixed_config(text_config, tmp_path, story):
    """Text files, lines with empty and bad documents, and gzip."""
    lines = [json.dumps({"text": t}) for t in (story(50), "", story(200), "caf\u00e9 \u2603")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no document"]) + "\n")
    with gzip.open(tmp_path / "b.json.gz", "wt") as stream:
        stream.write("\n".join(reversed(lines)) + "\n")
    (tmp_path / "c.txt").write_text("")
    train = (*(f"{tmp_path}/{n}" for n in ("a.jsonl", "b.json.gz", "c.txt")),)

    def make(**fields):
        train_files = (*train, f"{tmp_path}/books/train*.txt")
        return text_config(train_files=train_files, max_bad_documents=2, **fields)

    return make


def contents(config):
    directory = cache_directory(config)
    assert not [path for path in directory.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def files_and_fingerprint(config):
    """All files but the manifest, which says where large files were cut; the fingerprint."""
    found = contents(config)
    return found | {"manifest.json": json.loads(found["manifest.json"])["fingerprint"]}


def test_a_cache_is_the_same_to_the_byte_for_one_process_and_for_two(
    mixed_config, tmp_path, monkeypatch, story
):
    """For two, large files are cut: lines anywhere, Parquet at its row groups."""
    texts = [story(40, seed=i) for i in range(9)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=2)
    fields = {"tokenizer": "sentencepiece", "vocab_size": 300}

    def config(name):
        made = mixed_config(cache_dir=str(tmp_path / name), **fields)
        files = (*made.train_files, f"{tmp_path}/d.parquet")
        return dataclasses.replace(made, train_files=files)

    one, two = config("one"), config("two")
    build.build(one, workers=1)
    monkeypatch.setattr(corpora, "PIECE_BYTES", 300)
    built = build.build(two, workers=2)["train"]
    assert files_and_fingerprint(one) == files_and_fingerprint(two)
    assert len([name for name in contents(one) if name.endswith(".tokens")]) > 4
    assert built.summary["bad_documents"] == 1 and built.summary["empty_documents"] == 3
    cut = {Path(s["path"]).name: len(s["pieces"]) for s in built.sources if "pieces" in s}
    assert cut["a.jsonl"] == 3 and cut["d.parquet"] == 5 and len(cut) == 2


def test_another_field_of_the_same_files_is_another_text(tmp_path, text_config):
    """Also for parts that Beam left, and for runs that look for a cache by its fingerprint."""
    line = json.dumps({"text": "one", "title": "two"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 3)
    (tmp_path / "b.jsonl").write_text(line)
    fields = {"train_files": f"{tmp_path}/a.jsonl", "validation_files": f"{tmp_path}/b.jsonl"}
    configs = [
        text_config(**{key: (value,) for key, value in fields.items()}, text_field=field)
        for field in ("text", "title")
    ]
    text, title = (build.build(config)["train"] for config in configs)
    assert text.tokenizer.decode(text.tokens(0, 3).tolist()) == "one"
    assert title.tokenizer.decode(title.tokens(0, 3).tolist()) == "two"
    assert text.fingerprint != title.fingerprint
    contents = [sources.content_digest(cache.sources) for cache in (text, title)]
    assert contents[0] != contents[1]


def test_parts_of_other_books_are_not_reused():
    """The text of all of them is one package, whatever is chosen of it."""
    chosen = [{}, {"validation_books": ("bible-kjv",)}, {"excluded_books": ("bible-kjv",)}]
    directories = {
        BeamWorkers(DataConfig(**fields), BytesTokenizer(), Runner(), "text", "parts")._directory
        for fields in chosen
    }
    assert len(directories) == 3


def test_lines_are_cut_at_their_ends(tmp_path, monkeypatch):
    """Lines of all lengths, blank ones, and a last one without an end."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * (37 * i % 90)}) if i % 7 else "" for i in range(200)]
    path.write_text("\ufeff" + "\n".join(lines))
    whole = list(corpora.read_file(path))
    for size in (1, 100, 2000, 10**6):
        monkeypatch.setattr(corpora, "PIECE_BYTES", size)
        pieces = corpora.find_pieces(path, path.stat().st_size)
        assert [d for piece in pieces for d in corpora.read_file(path, piece=piece)] == whole
        if size == 1:
            assert len(pieces) == 200
        elif size < 10**6:
            sizes = [piece.end - piece.begin for piece in pieces[:-1]]
            assert len(sizes) > 2 and all(size <= n < size + 110 for n in sizes)
        else:
            assert pieces == [corpora.WHOLE]


def test_a_build_that_cut_a_file_elsewhere_begins_again(mixed_config, monkeypatch, tmp_path):
    """The documents of each part are counted, so the parts must be the same."""
    config, whole = mixed_config(), mixed_config(cache_dir=str(tmp_path / "whole"))
    build.build(whole, workers=1)
    save, calls = BuildState.save, []

    def interrupt(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildState, "save", interrupt)
        build.build(config, workers=1)
    monkeypatch.setattr(corpora, "PIECE_BYTES", 300)
    for path in tmp_path.glob("cache/*.sources.json"):
        path.unlink()
    build.build(config, workers=1)
    assert files_and_fingerprint(config) == files_and_fingerprint(whole)


def test_an_error_in_a_worker_comes_out_as_it_was_raised(text_config, tmp_path):
    (tmp_path / "books" / "train2.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(CorpusError, match=r"train2\.txt is not UTF-8: byte 0xff at offset 2"):
        build.build(text_config(), workers=2)


def test_a_stopped_pool_goes_on_with_the_parts_that_were_not_read(
    mixed_config, tmp_path, monkeypatch
):
    """In this process, with parts as a pool leaves them; then with other numbers of workers."""
    config = mixed_config()

    class Inline:
        """A pool whose workers are this process."""

        made = []

        def __init__(self, *_):
            pass

        def submit(self, task):
            self.made.append(task.args[2].files)
            result = task()
            return SimpleResult(result)

        def shutdown(self, **_):
            pass

    class SimpleResult:
        def __init__(self, value):
            self.result, self.cancel = lambda: value, lambda: None

    monkeypatch.setattr(tokenized, "ProcessPoolExecutor", Inline)
    whole = mixed_config(cache_dir=str(tmp_path / "whole"))
    build.build(whole, workers=2)
    assert len(Inline.made) == 9  # of both splits, each once
    for stop, workers in ((2, 2), (4, 1), (8, 2)):
        save, calls = BuildState.save, []

        def interrupt(*arguments, save=save, calls=calls, stop=stop):
            save(*arguments)
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(BuildState, "save", interrupt)
            build.build(config, workers=2)
        Inline.made.clear()
        build.build(config, workers=workers)
        if stop == 8:  # files that the complete shards hold are not tokenized again
            assert len(Inline.made) < 7
        assert contents(config) == contents(whole)
        for path in cache_directory(config).parent.glob("text-*"):
            if path.is_dir():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()


def test_documents_of_a_saved_part_from_any_number(text_config, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_READ_TOKENS", 100)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * (7 * i % 150)}) + "\n" for i in range(60)))
    config, tokenizer = text_config(train_files=(str(path),)), BytesTokenizer()
    part = parts.Part("text", "train", 0, (str(path),), 1)
    output = str(tmp_path / "parts" / "p")
    parts.save_part(config, lambda: tokenizer, part, output)
    for skip in (0, 1, 30, 59, 60):
        pair = [
            (list(parts.read_saved_part(part, output, skip))),
            (list(parts.tokenize_part(config, tokenizer, part, skip))),
        ]
        saved, direct = ([x for g in groups for x in g.names] for groups in pair)
        assert saved == direct and len(saved) == 60 - skip
        for name in ("tokens", "lengths", "bytes", "changed"):
            joined = [np.concatenate([[], *(getattr(g, name) for g in x)]) for x in pair]
            np.testing.assert_array_equal(*joined)
    assert len(list(parts.read_saved_part(part, output))) > 20  # some at a time


def test_a_worker_that_is_killed_is_told(text_config, tmp_path):
    """As the system does when memory is short."""
    with (
        tokenized.Pool(text_config(), BytesTokenizer(), tmp_path, 1) as pool,
        pytest.raises(CorpusError, match="a process that tokenizes was killed.*--workers N"),
    ):
        list(pool._in_order([functools.partial(os._exit, 1)]))


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"max_tokens": 5000}, None),
        ({"max_tokens": 1}, 1),
        ({"max_documents": 4}, 4),
        ({"max_documents": 3, "max_tokens": 10**9}, 3),
        ({"max_tokens": 10**9}, 10),
    ],
)
def test_a_part_of_a_corpus_is_its_first_documents_whole(
    mixed_config, tmp_path, fields, count, monkeypatch, capsys
):
    whole = build.build(mixed_config(cache_dir=str(tmp_path / "whole")), workers=1)["train"]
    ends = np.append(0, whole.documents["start"] + whole.documents["length"])
    if count is None:
        count = int(np.searchsorted(ends, fields["max_tokens"]))
        assert 1 < count < 9
    config = mixed_config(**fields)
    save, calls = BuildState.save, []

    def interrupt(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    if ends[count] > 3000:  # it goes on to the same end
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(BuildState, "save", interrupt)
            build.build(config, workers=1)
    capsys.readouterr()
    found = build.build(config, workers=1)["train"]
    assert found.documents.tolist() == whole.documents[:count].tolist()
    tokens = whole.tokens(0, int(ends[count]))
    np.testing.assert_array_equal(found.tokens(0, found.num_tokens), tokens)
    assert found.fingerprint != whole.fingerprint
    said = "the corpus ends after 10,880 tokens, before max_tokens = 1000000000\n"
    assert (said in capsys.readouterr().err) == (count == 10)
    again = mixed_config(cache_dir=str(tmp_path / "again"), **fields)
    assert build.build(again, workers=1)["train"].fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, r"\|\s*([\d.]+k)/\1"),
        ({"max_tokens": 5000}, r"5\.00k/5\.00k .*tokens/s\]"),
        ({"max_documents": 4}, r"4\.00/4\.00 .*documents/s, [\d,]+ tokens\]"),
        ({"max_documents": 4, "max_tokens": 1000}, r"1\.00k/1\.00k .*tokens/s\]"),
    ],
)
def test_the_bar_of_a_build_ends_at_its_end(mixed_config, fields, end, capsys):
    build.build(mixed_config(**fields), workers=1)
    said = capsys.readouterr().err.replace("\r", "\n")
    assert re.search(rf"tokenize train: 100%.*{end}", said), said


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bytes_are_reported_within_a_file(text_config, tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(500)).encode()
    for number in range(2):
        content = gzip.compress(lines) if suffix.endswith(".gz") else lines
        (tmp_path / "books" / f"pages{number}{suffix}").write_bytes(content)
    config = text_config(train_files=(f"{tmp_path}/books/pages*{suffix}",))
    sources, steps = build.list_sources(config), []
    size = next(source["size"] for source in sources if source["split"] == "train")
    workers = tokenized.InProcess(config, BytesTokenizer())
    groups = tokenized.read_documents(config, "train", workers, sources, report=steps.append)
    read = [sum(steps) for _ in groups]
    assert sum(steps) == 2 * size and len(read) == 16
    assert read[8 + 4] == pytest.approx(1.5 * size, rel=0.03)  # the second file, half of it
    assert suffix == ".jsonl.gz" or read[4] == pytest.approx(0.5 * size, rel=0.1)


@pytest.mark.parametrize("field", ["max_tokens", "max_documents"])
def test_a_part_has_one_or_more(text_config, field):
    with pytest.raises(ValueError, match=rf"{field} = 0 .*accepted: an integer of 1 or more"):
        text_config(**{field: 0})


def test_workers_are_at_most_the_parts(text_config):
    config = text_config()
    sources = build.list_sources(config)
    assert build._count_workers(config, sources, 99) == 4
    assert build._count_workers(config, sources, 3) == 3
    with pytest.raises(ValueError, match="workers = 0; accepted: 1 or more"):
        build.build(config, workers=0)
