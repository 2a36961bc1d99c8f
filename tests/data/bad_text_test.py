"""Text that cannot be read: refused by place, or left out within a budget and counted."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from fope_jax.data import build, cache, corpora
from fope_jax.data.build import inspect
from fope_jax.data.corpora import CorpusError, Document, read_file
from fope_jax.data.manifest import CacheError
from fope_jax.data.sources import check_held_out, remarks


def file_of(tmp_path, content, name="a.jsonl"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


# ---------------------------------------------------------------------------- reading


def test_bad_documents_keep_their_place_among_the_others(tmp_path):
    content = b'{"text": "one"}\n\xff\n{"body": 1}\n\n{"text": "two"}\n'
    path = file_of(tmp_path, content)
    documents = list(read_file(path, skip_bad=True))
    assert [d.text for d in documents] == ["one", "", "", "", "two"]
    assert [d.name for d in documents] == [f"{path}:{n}" for n in range(1, 6)]
    assert [bool(d.bad) for d in documents] == [False, True, True, False, False]
    assert "byte 0xff at offset 16" in documents[1].bad
    assert "a.jsonl:3 has no string field 'text'" in documents[2].bad
    assert "the line begins at offset 18" in documents[2].bad


def test_a_text_file_is_bad_as_a_whole(tmp_path):
    path = file_of(tmp_path, b"good \xc3\xa9 bad \xe9", "a.txt")
    (document,) = read_file(path, skip_bad=True)
    assert document.text == "" and "0xe9 at offset 12" in document.bad


def test_a_line_that_is_too_long_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 40)
    long = json.dumps({"text": "x" * 3_000_000}).encode()
    exactly = b'{"text": "' + b"y" * 27 + b'"}\n'
    assert len(exactly) == 40
    path = file_of(tmp_path, exactly + long + b'\n{"text": "after"}')
    with pytest.raises(CorpusError, match=r"a\.jsonl:2 \(offset 40\) .*more than 40 bytes; cut it"):
        list(read_file(path))
    documents = list(read_file(path, skip_bad=True))
    assert [d.text for d in documents] == ["y" * 27, "", "after"]
    # What follows keeps its offset.
    path = file_of(tmp_path, exactly + long + b"\nnothing")
    with pytest.raises(CorpusError, match=f"the line begins at offset {len(long) + 41}"):
        list(dict.fromkeys(_raised(d) for d in read_file(path, skip_bad=True)))


def _raised(document: Document):
    if "is not JSON" in document.bad:
        raise CorpusError(document.bad)


def test_a_text_that_unpacks_to_more_than_a_document_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 1000)
    path = file_of(tmp_path, gzip.compress(b"x" * 10_000_000), "a.txt.gz")
    assert path.stat().st_size < 20_000
    with pytest.raises(CorpusError, match=r"a\.txt\.gz .*a document of more than 1,000 bytes"):
        list(read_file(path))


@pytest.mark.parametrize("damage", ["cut", "checksum", "middle", "no gzip"])
def test_a_damaged_gzip_file_is_bad_as_a_whole(tmp_path, damage):
    lines = b"".join(b'{"text": "number %d"}\n' % n**9 for n in range(1000))
    content = bytearray(gzip.compress(lines))
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "checksum":  # every line can be unpacked, and one of them may be wrong
        content[-6] ^= 4
    elif damage == "middle":
        content[len(content) // 2] ^= 255
    else:
        content = b"plain"
    path = file_of(tmp_path, bytes(content), "a.jsonl.gz")
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz is not a complete gzip .*leave it out"):
        list(read_file(path))
    documents = list(read_file(path, skip_bad=True))
    least, most = {"cut": (200, 999), "middle": (1, 2000), "no gzip": (1, 1)}.get(
        damage, (1000, 1000)
    )
    assert least <= len(documents) <= most
    assert [d.name for d in documents] == [f"{path}:{n + 1}" for n in range(len(documents))]
    (reason,) = {d.bad for d in documents}
    assert "a.jsonl.gz is not a complete gzip file: " in reason
    assert (
        f"the whole file is left out, {len(documents):,} documents as far as it unpacks" in reason
    )
    assert not any(d.text for d in documents)


def test_a_damaged_text_file_is_one_document(tmp_path):
    path = file_of(tmp_path, gzip.compress(b"two\nlines\n" * 1000)[:-9], "a.txt.gz")
    (document,) = read_file(path, skip_bad=True)
    assert document.name == str(path) and document.text == ""
    assert "the whole file is left out, 1 documents as far as it unpacks" in document.bad


def test_nothing_of_a_damaged_gzip_file_is_used_before_it_is_noticed(tmp_path):
    # A build that stopped could go on with some of it otherwise, under a budget that forbids it.
    path = file_of(tmp_path, gzip.compress(b'{"text": "one"}\n' * 9)[:-1], "a.jsonl.gz")
    documents = read_file(path)
    with pytest.raises(CorpusError, match="is not a complete gzip file"):
        next(documents)


def test_a_gzip_file_that_cannot_be_opened_is_no_bad_document(tmp_path):
    with pytest.raises(CorpusError, match=r"none\.jsonl\.gz cannot be read: .*No such file"):
        list(read_file(tmp_path / "none.jsonl.gz", skip_bad=True))


# ---------------------------------------------------------------------------- building


@pytest.fixture
def broken_config(text_config, tmp_path):
    """Three good documents and two bad ones, in different kinds of files."""
    folder = tmp_path / "books"
    (folder / "train1.txt").write_bytes(b"\xff\xfe")
    lines = [b'{"text": "first line"}', b"{", b'{"text": "third line"}']
    (folder / "train4.jsonl").write_bytes(b"\n".join(lines))
    (folder / "train2.txt").unlink()
    (folder / "train3.txt").unlink()

    def make(**fields):
        return text_config(train_files=(f"{folder}/train*",), **fields)

    return make


def test_bad_documents_are_counted_shown_and_in_the_fingerprint(
    broken_config, tmp_path, monkeypatch, capsys
):
    config = broken_config(max_bad_documents=2)
    built = build.build(config)["train"]
    text = built.tokenizer.decode(built.tokens(0, built.num_tokens))
    assert text.endswith("first linethird line") and len(built.documents) == 3
    assert built.summary["bad_documents"] == 2 and built.summary["empty_documents"] == 0
    said = capsys.readouterr().err
    assert "train: 2 documents cannot be read and are left out (max_bad_documents = 2)" in said
    assert "train1.txt is not UTF-8: byte 0xff at offset 0" in said
    shown = inspect(config)
    assert "left out as unreadable: 2" in shown and "train4.jsonl:2 is not JSON" in shown
    # A larger budget opens the same cache, a smaller one does not.
    more = dataclasses.replace(config, max_bad_documents=9)
    assert cache.open_cache(more, "train").fingerprint == built.fingerprint
    for less in (0, 1):
        strict = dataclasses.replace(config, max_bad_documents=less)
        with pytest.raises(CacheError, match=f"lacks 2 train documents.*_documents = {less};"):
            cache.open_cache(strict, "train")


def test_a_build_that_goes_on_counts_each_bad_document_once(broken_config, monkeypatch):
    config = broken_config(max_bad_documents=2)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 64)
    write_json, calls = build.write_json, []

    def interrupt(path, value):
        write_json(path, value)
        calls.append(path.name)
        if len(calls) == len(built_shards) - 1:
            raise KeyboardInterrupt

    whole = dataclasses.replace(config, cache_dir=config.cache_dir + "_whole")
    built_shards = build.build(whole)["train"].summary["shards"]
    monkeypatch.setattr(build, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.build(config)
    monkeypatch.setattr(build, "write_json", write_json)
    built, expected = build.build(config)["train"], cache.open_cache(whole, "train")
    assert built.summary == expected.summary and built.summary["bad_documents"] == 2
    assert built.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(
        built.tokens(0, built.num_tokens), expected.tokens(0, expected.num_tokens)
    )


def test_a_budget_that_is_used_up_can_be_raised(broken_config):
    with pytest.raises(CorpusError, match=r"(?s)^2 documents of the train split .*= 1; .*train4"):
        build.build(broken_config(max_bad_documents=1))
    assert build.build(broken_config(max_bad_documents=2))["train"].summary["documents"] == 3
    with pytest.raises(ValueError, match="max_bad_documents = -1 .*accepted: 0 or more"):
        broken_config(max_bad_documents=-1)


def test_a_damaged_file_costs_the_budget_of_all_its_documents(text_config, tmp_path, capsys):
    good = "".join(json.dumps({"text": f"page {n} of this"}) + "\n" for n in range(9))
    (tmp_path / "a.jsonl").write_text(good)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good.replace("this", "b").encode())[:-4])
    files = {"train_files": (f"{tmp_path}/[ab].jsonl*",)}
    message = r"^8 documents .* = 7; the first of them:\n  \S+b\.jsonl\.gz is not a com[^\n]+$"
    with pytest.raises(CorpusError, match=message):
        build.build(text_config(max_bad_documents=7, **files))
    config = text_config(max_bad_documents=9, **files)
    built = build.build(config)["train"]
    assert built.summary["documents"] == 9 and built.summary["bad_documents"] == 9
    assert "of this" in built.tokenizer.decode(built.tokens(0, 40))
    assert "train: 9 documents cannot be read and are left out" in capsys.readouterr().err
    assert inspect(config).count("b.jsonl.gz is not a complete gzip file") == 1


# ---------------------------------------------------------------------------- files


def source(path, split, digest, size=3):
    return {"path": path, "size": size, "corpus": "text", "split": split, "sha256": digest}


def test_copies_and_empty_files_are_told_and_shared_text_is_refused():
    sources = [source(f"{n}.txt", "train", digest) for n, digest in enumerate("aabaa")]
    sources += [source("e.txt", "train", "empty", 0), source("f.txt", "validation", "empty", 0)]
    assert remarks(sources, "train") == [
        "train: empty files, 1: e.txt",
        "train: files of the same content, which counts again, 3: 1.txt (as 0.txt),"
        " 3.txt (as 0.txt), 4.txt (as 0.txt)",
    ]
    assert remarks(sources, "validation") == ["validation: empty files, 1: f.txt"]
    check_held_out(sources)  # that both have an empty file says nothing
    check_held_out([source("w.whl", "train", "w"), source("w.whl", "validation", "w")])
    message = "held.txt has the same content as training file 2.txt"
    with pytest.raises(CorpusError, match=message):
        check_held_out([*sources, source("held.txt", "validation", "b")])
