"""Parquet: columns, types, row groups, damage; against the same text as JSON lines."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fope_jax.data import corpora, parquet
from fope_jax.data.corpora import CorpusError, Piece, read_file

TEXTS = ["It was the best of times.", "caf\u00e9 \u2603", "", "a\nb", "x" * 3000, "last"]


def write(path, texts, kind=None, column="text", **options):
    texts = pa.array(texts, kind or pa.string())
    table = pa.table({"url": [str(i) for i in range(len(texts))], column: texts})
    pq.write_table(table, path, row_group_size=2, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_rows_are_documents_as_lines_are(tmp_path, kind, compression):
    path = write(tmp_path / "a.parquet", TEXTS, kind, compression=compression)
    found = list(read_file(path))
    assert [document.text for document in found] == TEXTS
    assert found[4].name == f"{path.as_posix()}:5" and not any(d.bad for d in found)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert [d.text for d in read_file(lines)] == TEXTS
    assert corpora.examine_text_file(path) == ("", False)


def test_pieces_of_row_groups_are_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", TEXTS * 5)
    monkeypatch.setattr(corpora, "PIECE_BYTES", 60)
    pieces = corpora.find_pieces(path, path.stat().st_size)
    assert len(pieces) > 5 and pieces[0] == Piece(0, pieces[1].begin, 0) and pieces[-1].end is None
    cut = [document for piece in pieces for document in read_file(path, piece=piece)]
    assert cut == list(read_file(path)) and len(cut) == 30


def test_another_column_and_those_that_are_none(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS, column="content")
    assert [d.text for d in read_file(path, field="content")] == TEXTS
    for look in (read_file, corpora.examine_text_file):
        with pytest.raises(
            CorpusError, match=r"a.parquet has no column 'text': it has \['url', 'c"
        ):
            list(look(path))
    with pytest.raises(CorpusError, match="--config.data.text_field=NAME"):
        corpora.examine_text_file(path, "body")
    numbers = write(tmp_path / "b.parquet", [1, 2, 3], pa.int64())
    with pytest.raises(CorpusError, match="b.parquet: column 'text' is of int64, no text"):
        corpora.examine_text_file(numbers)


def test_a_row_without_text_is_a_bad_document(tmp_path):
    path = write(tmp_path / "a.parquet", ["one", None, "three"])
    with pytest.raises(CorpusError, match="a.parquet:2 has no text: its 'text' is null"):
        list(read_file(path))
    assert [(d.text, bool(d.bad)) for d in read_file(path, skip_bad=True)] == [
        ("one", False),
        ("", True),
        ("three", False),
    ]
    invalid = pa.array([b"good", b"ab\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(
        CorpusError, match="a.parquet:2 is not UTF-8: byte 0xff at offset 2 .* 'text'"
    ):
        list(read_file(path))


def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 2999)
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(CorpusError, match="a.parquet:5 is a document of more than 2,999 bytes"):
        list(read_file(path))


def test_damage_is_found_before_a_document_is_used(tmp_path):
    path = write(
        tmp_path / "a.parquet", TEXTS, write_page_checksum=True, compression="none", column="text"
    )
    whole = path.read_bytes()
    at = whole.index(b"x" * 3000) + 1500
    damaged = {
        "flipped": whole[:at] + b"y" + whole[at + 1 :],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
    }
    for what, content in damaged.items():
        path.write_bytes(content)
        problem, _ = corpora.examine_text_file(path)
        assert problem.startswith(f"{path} is not a complete Parquet file: "), what
        assert problem.endswith("or leave it out")
        with pytest.raises(CorpusError, match="is not a complete Parquet file"):
            list(read_file(path))
    assert "it is a Git LFS pointer, not the file that it stands for; fetch that with" in problem
    assert issubclass(parquet.DamagedFileError, CorpusError)
    with pytest.raises(CorpusError, match="none.parquet cannot be read"):
        corpora.examine_text_file(tmp_path / "none.parquet")
