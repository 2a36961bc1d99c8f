"""Text in Parquet files, such as those of Hugging Face's datasets: a row is a document."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fope_jax.data.documents import NAME_FIELD, CorpusError
from fope_jax.extras import require
from fope_jax.storage.content import detect_content, read_head

SUFFIX = ".parquet"
_ROWS_AT_ONCE = 64
_KEYS_SHOWN = 8


class DamagedFileError(CorpusError):
    """A file that is no complete Parquet file, whichever column is asked for."""


def read_rows(
    path: Path, column: str, first_group: int = 0, end_group: int | None = None
) -> Iterator[bytes | None]:
    """The values of a column of text in the row groups ``[first_group, end_group)``, in order.

    Pages with checksums are compared with them. None is a row without a value.

    Raises:
      CorpusError: the file is no Parquet file, has no such column of text, or is damaged.
    """
    pa: Any = require("pyarrow", "parquet")
    with _open(path, column) as file:
        groups = list(range(file.num_row_groups)[first_group:end_group])
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from error
            if batch is None:
                return
            texts = batch.column(0)
            if pa.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            yield from texts.cast(pa.large_binary()).to_pylist()


def row_groups(path: Path, column: str) -> list[tuple[int, int]]:
    """Rows of each row group, and stored bytes of the column; errors as of `read_rows`."""
    with _open(path, column) as file:
        # Leaves of the schema, of which a nested column has several.
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        index = leaves.index(column)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        return [(group.num_rows, group.column(index).total_compressed_size) for group in groups]


def find_damage(path: Path, column: str) -> str:
    """Why a file cannot be read to its end, or ""; CorpusError if it has no such column of text."""
    try:
        collections.deque(read_rows(path, column), maxlen=0)
    except DamagedFileError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def _open(path: Path, column: str) -> Iterator[Any]:
    pa: Any = require("pyarrow", "parquet")
    parquet: Any = require("pyarrow.parquet", "parquet")
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error}") from error
        try:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            stack.enter_context(file)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        names = file.schema_arrow.names
        if column not in names:
            more = ", ..." if len(names) > _KEYS_SHOWN else ""
            raise CorpusError(
                f"{path} has no column {column!r}: it has {names[:_KEYS_SHOWN]}{more}; {NAME_FIELD}"
            )
        kind = file.schema_arrow.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        types = pa.types
        if not any(f(kind) for f in (types.is_string, types.is_large_string, types.is_string_view)):
            raise CorpusError(f"{path}: column {column!r} is of {kind}, no text; {NAME_FIELD}")
        yield file


def _damaged(path: Path, error: object) -> DamagedFileError:
    advice, found = "fetch it again", detect_content(read_head(path))
    if found is not None and found.kind != "a Parquet file":
        error, advice = f"it is {found.kind}", found.advice
    reason = " ".join(str(error).split())
    return DamagedFileError(
        f"{path} is not a complete Parquet file: {reason}; {advice}, or leave it out"
    )
