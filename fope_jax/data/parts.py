"""A part of a corpus: tokenized by one process, saved, and read again in its turn."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fope_jax.data.cache_reader import token_dtype
from fope_jax.data.cache_writer import writing_errors
from fope_jax.data.config import DataConfig
from fope_jax.data.corpora import WHOLE, Piece, read_corpus, read_file
from fope_jax.data.documents import Document, TokenizedDocuments, encode_group, group_documents
from fope_jax.data.sources import Source
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.storage.paths import as_path, is_in_bucket

PART_BYTES = 2**23  # small files share a part
_READ_TOKENS = 2**20  # of a saved part at a time


class Part(NamedTuple):
    """What one process tokenizes of a corpus.

    Attributes:
      number: of the part in its split.
      files: paths; none stands for the whole corpus.
      size: bytes of the files.
      piece: of the file, where there is one.
    """

    corpus: str
    split: str
    number: int
    files: tuple[str, ...]
    size: int
    piece: Piece = WHOLE


def list_parts(
    config: DataConfig,
    corpus: str,
    split: str,
    sources: Iterable[Source],
    left_out: Collection[str] = (),
) -> list[Part]:
    """The parts of a split in order: large files or their pieces, small files up to ``PART_BYTES``.

    None for C4 from TFDS, whose reader mixes its files.
    """
    if corpus == "c4" and config.tfds_data_dir:
        return []
    files = [s for s in sources if (s["corpus"], s.get("split")) == (corpus, split)]
    if corpus == "gutenberg":
        return [Part(corpus, split, 0, (), _book_bytes(config, split))]
    parts: list[Part] = []
    for file in files:
        if file["path"] in left_out:
            continue
        if pieces := file.get("pieces"):
            whole = Part(corpus, split, 0, (file["path"],), file["size"] // len(pieces))
            for piece in pieces:
                parts.append(whole._replace(number=len(parts), piece=Piece(*piece)))
        elif parts and parts[-1].piece == WHOLE and parts[-1].size + file["size"] <= PART_BYTES:
            last = parts[-1]
            size, names = last.size + file["size"], (*last.files, file["path"])
            parts[-1] = last._replace(files=names, size=size)
        else:
            parts.append(Part(corpus, split, len(parts), (file["path"],), file["size"]))
    return parts


def split_bytes(
    config: DataConfig, split: str, sources: Iterable[Source], left_out: Collection[str] = ()
) -> int:
    """Bytes that `read_documents` reports: of files, or of the books in the package of all."""
    files = [s for s in sources if s.get("split") == split and s["path"] not in left_out]
    corpora = {file["corpus"] for file in files}
    size = sum(file["size"] for file in files if file["corpus"] != "gutenberg")
    return size + (_book_bytes(config, split) if "gutenberg" in corpora else 0)


def _book_bytes(config: DataConfig, split: str) -> int:
    return sum(len(book.text.encode()) for book in read_corpus(config, "gutenberg", split))


def tokenize_group(
    tokenizer: Tokenizer, corpus: str, group: Sequence[Document]
) -> TokenizedDocuments:
    tokens, *columns = encode_group(tokenizer, [document.text for document in group])
    lengths, sizes, changed = columns
    names, bad = [d.name for d in group], [d.bad for d in group]
    return TokenizedDocuments(corpus, names, tokens, lengths, sizes, bad, changed)


def tokenize_part(
    config: DataConfig, tokenizer: Tokenizer, part: Part, skip: int = 0
) -> Iterator[TokenizedDocuments]:
    """The documents of a part from number ``skip``."""
    lenient = config.max_bad_documents > 0
    if part.files:
        documents = itertools.chain.from_iterable(
            read_file(as_path(file), lenient, config.text_field, part.piece) for file in part.files
        )
    else:
        documents = read_corpus(config, part.corpus, part.split)
    for group in group_documents(itertools.islice(documents, skip, None)):
        yield tokenize_group(tokenizer, part.corpus, group)


def take_documents(
    group: TokenizedDocuments, first: int, last: int, begin: int, end: int
) -> TokenizedDocuments:
    """Documents ``[first, last)`` of a group, whose tokens are ``[begin, end)`` of it."""
    part = slice(first, last)
    return TokenizedDocuments(
        group.corpus,
        group.names[part],
        group.tokens[begin:end],
        group.lengths[part],
        group.bytes[part],
        group.bad[part],
        group.changed[part],
    )


def part_name(part: Part) -> str:
    return f"{part.split}-{part.corpus}-{part.number:05d}"


def save_part(config: DataConfig, load: Callable[[], Tokenizer], part: Part, output: str) -> str:
    """Tokenizes a part on a worker, unless that is done; its ``.npz`` appears last, and whole."""
    if as_path(output + ".npz").exists():
        return output
    tokenizer = load()
    dtype = token_dtype(tokenizer.vocab_size)
    columns: dict[str, list[Any]] = {name: [] for name in ("lengths", "bytes", "changed")}
    names, bad = [], []
    with _written_whole(output + ".tokens") as stream:
        for group in tokenize_part(config, tokenizer, part):
            stream.write(group.tokens.astype(dtype).tobytes())
            names += group.names
            bad += group.bad
            for name, values in columns.items():
                values.append(getattr(group, name))
    arrays: dict[str, Any] = {k: np.concatenate([[], *v]) for k, v in columns.items()}
    texts = {"names": names, "bad": bad}
    arrays |= {k: np.frombuffer(json.dumps(v).encode(), np.uint8) for k, v in texts.items()}
    content = io.BytesIO()
    np.savez(content, dtype=np.array(dtype.str), **arrays)
    with _written_whole(output + ".npz") as stream:
        stream.write(content.getvalue())
    return output


def read_saved_part(part: Part, output: str, skip: int = 0) -> Iterator[TokenizedDocuments]:
    """The documents of a saved part from number ``skip``, some at a time."""
    content = io.BytesIO(as_path(output + ".npz").read_bytes())
    with np.load(content, allow_pickle=False) as columns:
        names, bad = (json.loads(columns[key].tobytes()) for key in ("names", "bad"))
        lengths, sizes = (columns[key].astype(np.int64) for key in ("lengths", "bytes"))
        changed, dtype = columns["changed"].astype(bool), np.dtype(str(columns["dtype"]))
    tokens = np.frombuffer(as_path(output + ".tokens").read_bytes(), dtype)
    whole = TokenizedDocuments(part.corpus, names, tokens, lengths, sizes, bad, changed)
    ends = np.append(0, np.cumsum(lengths))
    first = skip
    while first < len(lengths):
        last = int(np.searchsorted(ends, ends[first] + _READ_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        yield take_documents(whole, first, last, int(ends[first]), int(ends[last]))
        first = last


def remove_part(output: str) -> None:
    for suffix in (".npz", ".tokens"):
        as_path(output + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _written_whole(output: str) -> Iterator[Any]:
    """A file under a temporary name: two workers may write the same, and one may be killed."""
    path = as_path(output)
    with writing_errors(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_in_bucket(path):  # an object appears when it is whole
            with path.open("wb") as stream:
                yield stream
            return
        temporary = path.with_name(f"unfinished-{uuid.uuid4().hex}-{path.name}")
        try:
            with temporary.open("wb") as stream:
                yield stream
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
