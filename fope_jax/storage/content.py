"""Recognizes a file's content by its first bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

UTF8_BOM = b"\xef\xbb\xbf"  # the byte order mark that some editors write first
HEAD_BYTES = 1024
GGUF_MAGIC = b"GGUF"


class Content(NamedTuple):
    """What a file holds, as a noun, and what to do about it."""

    kind: str
    advice: str


GIT_LFS_POINTER = Content(
    "a Git LFS pointer, not the file that it stands for", "fetch that with `git lfs pull`"
)
_UNPACK, _CONVERT = "unpack it first", "convert it first"
_MAGIC = (
    (rb"version https://git-lfs[^\n]*\noid sha256:", *GIT_LFS_POINTER),
    (
        rb"(\.\./)*(\.git)?/annex/objects/",
        "a git-annex pointer, not the file that it stands for",
        "fetch that with `git annex get`",
    ),
    (rb"\x1f\x8b", "gzip data", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "Zstandard data", _UNPACK),
    (rb"\xfd7zXZ\x00", "xz data", _UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2 data", _UNPACK),
    (rb"\x04\x22\x4d\x18", "LZ4 data", _UNPACK),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb".{257}ustar(\x00|  \x00)", "a tar archive", _UNPACK),
    (rb"PAR1\x15", "a Parquet file", _CONVERT),
    (rb"ARROW1\x00\x00", "an Arrow file", _CONVERT),
    (rb"\x89HDF\r\n", "an HDF5 file", _CONVERT),
    (rb"%PDF-", "a PDF file", _CONVERT),
    (rb"\0{256}", "a file that begins with zero bytes, as a broken copy does", "fetch it again"),
)
_ENCODINGS = (
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "text in UTF-32", "convert it, as with iconv"),
    (
        # Also without a mark: as UTF-8 it would pass for text with zero bytes between letters.
        rb"\xff\xfe|\xfe\xff|([\x01-\x7f]\0){4}|(\0[\x01-\x7f]){4}",
        "text in UTF-16",
        "convert it, as with iconv",
    ),
)
# Servers send these in place of a missing file.
_MARKUP = (
    (rb"(\xef\xbb\xbf)?\s*(?i:<!doctype html|<html)", "an HTML page", "fetch it again"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "an XML document", "fetch it again"),
)


def detect_content(head: bytes, text: bool = False) -> Content | None:
    """The kind of a file that is neither text nor JSON, by its first bytes; ``text`` allows markup.

    >>> detect_content(b"PK\\3\\4...")
    Content(kind='a zip archive', advice='unpack it first')
    """
    for pattern, kind, advice in (*_MAGIC, *_ENCODINGS, *(() if text else _MARKUP)):
        if re.match(pattern, head, re.DOTALL):
            return Content(kind, advice)
    return None


def has_gguf_magic(path: Path) -> bool:
    """Whether a path is a file that begins as a GGUF file does."""
    return path.is_file() and read_head(path).startswith(GGUF_MAGIC)


def is_other_encoding(content: Content) -> bool:
    """Whether the file is text in another encoding than UTF-8."""
    return content in [Content(kind, advice) for _, kind, advice in _ENCODINGS]


def read_head(path: Path) -> bytes:
    """The first ``HEAD_BYTES`` bytes; empty if the file cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(HEAD_BYTES)
    except OSError:
        return b""
