"""Text that cannot be read: refused by place, or left out within a budget and counted."""

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fope_jax.data import build, cache, corpora, parts, sources
from fope_jax.data.build_state import BuildState
from fope_jax.data.cache_directories import base_directory, cache_directory
from fope_jax.data.corpora import CorpusError, Document, read_file
from fope_jax.data.inspect_cache import inspect
from fope_jax.data.manifest import CacheError, add_digest
from fope_jax.data.sources import check_held_out, list_sources, source_warnings


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


def packed_lines():
    return gzip.compress(b"".join(b'{"text": "number %d"}\n' % n**9 for n in range(1000)))


@pytest.mark.parametrize("damage", ["cut", "checksum", "middle", "no gzip", "empty", "header"])
def test_a_damaged_gzip_file(tmp_path, damage):
    content = bytearray(packed_lines())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "checksum":  # every line can be unpacked, and one of them may be wrong
        content[-6] ^= 4
    elif damage == "middle":
        content[len(content) // 2] ^= 255
    elif damage == "header":
        content[0] ^= 1
    else:
        content = b"plain" if damage == "no gzip" else b""
    path = file_of(tmp_path, bytes(content), "a.jsonl.gz")
    found = corpora.examine_text_file(path)[0]
    assert found.startswith(f"{path} is not a complete gzip file: ")
    assert found.endswith("; fetch it again, or leave it out")
    if damage != "middle":  # what unpacks may be no JSON
        with pytest.raises(
            CorpusError, match=r"a\.jsonl\.gz is not a complete gzip .*leave it out"
        ):
            list(read_file(path, skip_bad=True))


def test_whole_gzip_files(tmp_path, monkeypatch):
    two = packed_lines() + gzip.compress(b'{"text": "more"}') + bytes(64)  # members, and padding
    assert corpora.examine_text_file(file_of(tmp_path, two, "a.jsonl.gz"))[0] == ""
    with pytest.raises(CorpusError, match=r"none\.gz cannot be read: .*No such file"):
        corpora.examine_text_file(tmp_path / "none.gz")
    # Of one document no more is unpacked than it may have: it is refused for its length.
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 2**20)
    bomb = gzip.compress(b" " * 2**23)[:-1]
    assert corpora.examine_text_file(file_of(tmp_path, bomb, "a.txt.gz"))[0] == ""
    assert (
        "a.jsonl.gz is not" in corpora.examine_text_file(file_of(tmp_path, bomb, "a.jsonl.gz"))[0]
    )


# ---------------------------------------------------------------------------- building


def test_a_link_to_nothing_is_not_left_out(text_config, tmp_path):
    """As a file that git-annex or a cleared cache no longer has."""
    (tmp_path / "books" / "train9.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(CorpusError, match=r"train9\.txt cannot be read: .*No such file"):
        build.build(text_config())


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
    save, calls = BuildState.save, []

    def interrupt(state):
        save(state)
        calls.append(state)
        if len(calls) == len(built_shards) - 1:
            raise KeyboardInterrupt

    whole = dataclasses.replace(config, cache_dir=config.cache_dir + "_whole")
    built_shards = build.build(whole)["train"].summary["shards"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildState, "save", interrupt)
        build.build(config)
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


def test_a_budget_that_is_used_up_stops_the_next_build_too(text_config, tmp_path, monkeypatch):
    """At once, not after the rest of the text: complete shards hold the bad documents."""
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(cache, "SHARD_TOKENS", 64)
    lines = ["{", "{"] + ['{"text": "many words are here"}'] * 200
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = text_config(train_files=(f"{tmp_path}/a.jsonl",), max_bad_documents=1)
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"^2 documents of the train split cannot be read"):
            build.build(config, workers=1)


@pytest.fixture
def damaged_config(text_config, tmp_path):
    """One whole file of nine documents, and two that are damaged behind many more."""
    good = "".join(json.dumps({"text": f"page {n} of this"}) + "\n" for n in range(9))
    (tmp_path / "a.jsonl").write_text(good)
    for name in "bc":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(packed_lines()[: -ord(name) % 50 - 4])

    def make(**fields):
        return text_config(train_files=(f"{tmp_path}/[abc].jsonl*",), **fields)

    return make


def test_damaged_files_are_left_out_whole_within_a_budget(damaged_config, tmp_path, capsys):
    message = r"damaged files of the train split: 2, more than max_damaged_files = 1\n  \S+b\.jsonl"
    for allowed in (0, 1):
        with pytest.raises(CorpusError, match=message.replace("= 1", f"= {allowed}")) as raised:
            build.build(damaged_config(max_damaged_files=allowed, max_bad_documents=5000))
        assert str(raised.value).count("is not a complete gzip file") == 2
    assert "tokenize" not in capsys.readouterr().err  # before any of it is used
    config = damaged_config(max_damaged_files=2)
    built = build.build(config)["train"]
    assert built.summary["documents"] == 9 and built.summary["bad_documents"] == 0
    text = built.tokenizer.decode(built.tokens(0, built.num_tokens))
    assert text == "".join(f"page {n} of this" for n in range(9))
    line = "train: damaged files, left out, 2: "
    assert line in capsys.readouterr().err and line in inspect(config)
    build.build(config)
    said = capsys.readouterr().err
    assert line in said and "(built before)" in said
    strict = damaged_config(max_damaged_files=1)
    for work in (cache.open_cache, lambda config, split: build.build(config)):
        with pytest.raises(CacheError, match=r"lacks 2 train files that were damaged.*files = 1: "):
            work(strict, "train")
    # A file that is fetched again is taken in.
    (tmp_path / "b.jsonl.gz").write_bytes(packed_lines())
    assert build.build(strict)["train"].summary["documents"] == 1009
    assert "the text of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_damaged_files = -1 .*accepted: 0 or more"):
        damaged_config(max_damaged_files=-1)


def test_files_are_looked_through_once(damaged_config, tmp_path, monkeypatch):
    looked = []
    examine = sources.examine_text_file

    def look(path, field):
        looked.extend([path.name] if path.suffix == ".gz" else [])
        return examine(path, field)

    monkeypatch.setattr(sources, "examine_text_file", look)
    with pytest.raises(CorpusError):
        build.build(damaged_config())
    assert sorted(looked) == ["b.jsonl.gz", "c.jsonl.gz"]
    build.build(damaged_config(max_damaged_files=2))
    build.build(damaged_config(max_damaged_files=2))
    assert len(looked) == 2
    (tmp_path / "b.jsonl.gz").write_bytes(packed_lines())
    build.build(damaged_config(max_damaged_files=2))
    assert looked[2:] == ["b.jsonl.gz"]
    # What a manifest without a word of damage says of a file is no reason not to look.
    known = build.read_manifest(cache_directory(damaged_config()))["sources"]
    for source in known:
        source.pop("damaged", None)
    found = sources.list_sources(damaged_config(), known)
    assert sorted(looked[3:]) == ["b.jsonl.gz", "c.jsonl.gz"]
    assert sources.damaged_files(found, "train")


def test_a_file_that_is_damaged_later_does_no_harm_to_a_cache(damaged_config, tmp_path, capsys):
    (tmp_path / "b.jsonl.gz").write_bytes(packed_lines())
    config = damaged_config(max_damaged_files=1)  # c is damaged from the beginning
    before = build.build(config)["train"]
    (tmp_path / "b.jsonl.gz").write_bytes(packed_lines()[:-3])
    after = build.build(config)["train"]
    assert after.fingerprint == before.fingerprint and after.summary == before.summary
    said = capsys.readouterr().err
    assert said.count("damaged files, left out, 1: ") == 2 and "(built before)" in said
    # Built anew it would lack both.
    with pytest.raises(CorpusError, match="damaged files of the train split: 2, more than"):
        build.build(dataclasses.replace(config, cache_dir=f"{tmp_path}/other"))


def test_what_is_left_out_is_in_the_digest_of_the_text(damaged_config):
    # A build that read some of a damaged file, as those of before did, must not go on.
    found = sources.list_sources(damaged_config())
    plain = [{k: v for k, v in source.items() if k != "damaged"} for source in found]
    assert sources.content_digest(found) != sources.content_digest(plain)


def test_files_that_hold_something_else_are_left_out_whole_within_a_budget(
    text_config, tmp_path, capsys
):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(gzip.compress(b'{"text": "twice"}\n')))

    def config(**fields):
        return text_config(train_files=(f"{tmp_path}/[abc].jsonl*",), **fields)

    with pytest.raises(CorpusError, match="(?s)damaged files of the train split: 2, .*b.jsonl is"):
        build.build(config(max_bad_documents=9))
    assert "tokenize" not in capsys.readouterr().err  # before any text is used
    built = build.build(config(max_damaged_files=2))["train"]
    assert built.summary["documents"] == 1 and built.summary["bad_documents"] == 0
    assert "c.jsonl.gz is no text: it is gzip data, once it is unpacked" in inspect(
        config(max_damaged_files=2)
    )


def test_a_cache_of_text_without_a_mark_stays_and_one_with_it_is_built_again(
    text_config, tmp_path, capsys
):
    folder = tmp_path / "books"
    config = text_config()
    build.build(config)
    base = base_directory(config)

    def as_before():
        """What a build wrote that took a mark for text, and looked into no plain file."""
        cache_directory(config).rename(base)
        base.with_name(f"{base.name}.current.json").unlink()
        base.with_name(f"{base.name}.sources.json").unlink()
        manifest = json.loads((base / "manifest.json").read_text())
        for one in manifest["sources"]:
            del one["marked"], one["damaged"]
        parts = [[s["corpus"], s["split"], s["sha256"], None] for s in manifest["sources"]]
        manifest["content"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        manifest["fingerprint"] = hashlib.sha256(manifest["content"].encode()).hexdigest()
        (base / "manifest.json").write_text(json.dumps(add_digest(manifest)))
        return manifest

    capsys.readouterr()
    before = as_before()
    built = build.build(config)["train"]
    assert built.fingerprint == before["fingerprint"]
    assert capsys.readouterr().err.count("(built before)") == 2
    marked = b"\xef\xbb\xbf" + (folder / "train0.txt").read_bytes()
    (folder / "train0.txt").write_bytes(marked)
    build.build(config)
    shutil.rmtree(base)
    as_before()
    capsys.readouterr()
    again = build.build(config)["train"]
    assert "has changed: building another cache beside it" in capsys.readouterr().err
    assert again.documents["bytes"][0] == len(marked) - 3
    assert build.build(config)["train"].fingerprint == again.fingerprint != built.fingerprint
    assert "(built before)" in capsys.readouterr().err


def test_a_tokenizer_is_trained_without_damaged_files(damaged_config, monkeypatch):
    seen = []

    def train(texts, vocab_size):
        seen.extend(texts)
        return build.BytesTokenizer()

    monkeypatch.setattr(build, "train_sentencepiece", train)
    build.build(damaged_config(max_damaged_files=2, tokenizer="sentencepiece"))
    assert seen == [f"page {n} of this" for n in range(9)]


def test_parts_leave_damaged_files_out_and_small_files_share_one(
    damaged_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "PART_BYTES", 0)
    arguments = damaged_config(), "text", "train", list_sources(damaged_config())
    names = [f"{tmp_path}/{name}" for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.gz")]
    assert [part.files for part in parts.list_parts(*arguments)] == [(n,) for n in names]
    rest = parts.list_parts(*arguments, {names[1]})
    assert [part.files for part in rest] == [(names[0],), (names[2],)]
    monkeypatch.setattr(parts, "PART_BYTES", 2**23)
    (together,) = parts.list_parts(*arguments)
    assert together.files == tuple(names)
    assert together.size == sum(Path(name).stat().st_size for name in names)


def test_bad_documents_make_the_same_fingerprint_wherever_they_lie(text_config, tmp_path):
    found = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.jsonl").write_bytes(b'{"text": "some"}\n{\n{"text": "more"}\n')
        config = text_config(train_files=(f"{tmp_path}/{place}/a.jsonl",), max_bad_documents=1)
        found.append(build.build(config)["train"].fingerprint)
    assert found[0] == found[1]


# ---------------------------------------------------------------------------- files


def source(path, split, digest, size=3):
    return {"path": path, "size": size, "corpus": "text", "split": split, "sha256": digest}


def test_copies_and_empty_files_are_told_and_shared_text_is_refused():
    sources = [source(f"{n}.txt", "train", digest) for n, digest in enumerate("aabaa")]
    sources += [source("e.txt", "train", "empty", 0), source("f.txt", "validation", "empty", 0)]
    assert source_warnings(sources, "train") == [
        "train: empty files, 1: e.txt",
        "train: files of the same content, which counts again, 3: 1.txt (as 0.txt),"
        " 3.txt (as 0.txt), 4.txt (as 0.txt)",
    ]
    assert source_warnings(sources, "validation") == ["validation: empty files, 1: f.txt"]
    check_held_out(sources)  # that both have an empty file says nothing
    check_held_out([source("w.whl", "train", "w"), source("w.whl", "validation", "w")])
    message = "held.txt has the same content as training file 2.txt"
    with pytest.raises(CorpusError, match=message):
        check_held_out([*sources, source("held.txt", "validation", "b")])


def test_a_file_whose_name_is_no_utf8_may_have_unreadable_documents(text_config, tmp_path):
    path = os.fsencode(tmp_path / "books") + b"/train-caf\xe9.txt"
    with open(path, "wb") as stream:
        stream.write(b"\xff")
    built = build.build(text_config(max_bad_documents=1))["train"]
    assert built.summary["bad_documents"] == 1
