"""A dataset that TFDS has prepared: where it lies, what identifies it, and which files are whole.

A damaged file is a unit: TensorFlow reads nothing behind the damage, and ``dataset_info.json`` says
how many documents the file held, so that a count of what is left out is true.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, Document
from fope_jax.data.libraries import tf, tfds


def directory_of(config: DataConfig) -> str:
    """The prepared dataset's own directory, read in place: TFDS must not try to make it anew.

    Raises:
      CorpusError: there is none.
    """
    name, _, version = config.tfds_name.partition(":")
    directory = "/".join((config.tfds_data_dir.rstrip("/"), name, version)).rstrip("/")
    if not tf.io.gfile.exists(f"{directory}/dataset_info.json"):
        raise CorpusError(
            f"tfds_data_dir = {config.tfds_data_dir!r} holds no prepared {config.tfds_name}:"
            f" {directory}/dataset_info.json does not exist"
        )
    return directory


def identity(config: DataConfig) -> list[list[Any]]:
    """What identifies the content of a TFDS corpus without reading all of it.

    Where bad documents may be left out, all of it is read: which files are damaged decides what a
    build gives.
    """
    directory = directory_of(config)
    digest = hashlib.sha256()
    for file in ("dataset_info.json", "features.json"):
        with tf.io.gfile.GFile(f"{directory}/{file}", "rb") as stream:
            digest.update(stream.read())
    splits = tfds.builder_from_directory(directory).info.splits
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise CorpusError(f"{directory} has no split {missing}; it has {sorted(splits)}")
    found: list[list[Any]] = [[config.tfds_name, digest.hexdigest()]]
    found += [
        [split, splits[split].num_examples, list(splits[split].shard_lengths)] for split in SPLITS
    ]
    if config.max_bad_documents:
        damaged = [[split, file.shard] for split in SPLITS for file in damaged_files(config, split)]
        found += [["damaged", *damaged]] if damaged else []
    return found


class DamagedFile(NamedTuple):
    """A file of a split that cannot be read to its end.

    Attributes:
      shard: its place among the files of the split, from 0.
      file: its path.
      documents: how many it held when it was written.
      reason: what is wrong with it, and where.
    """

    shard: int
    file: str
    documents: int
    reason: str

    def as_documents(self) -> Iterator[Document]:
        """A bad document for each that is lost."""
        bad = f"{self.reason}; the whole file is left out, {self.documents:,} documents"
        for number in range(self.documents):
            yield Document(f"{self.file}:{number}", "", bad)


def damaged_files(config: DataConfig, split: str) -> Iterator[DamagedFile]:
    """Reads every file of a split; gives those that are damaged, or end early between records."""
    info = tfds.builder_from_directory(directory_of(config)).info.splits[split]
    files = zip(map(str, info.filepaths), info.shard_lengths, strict=True)
    for shard, (file, expected) in enumerate(files):
        number = 0
        try:
            for _ in tf.data.TFRecordDataset(file):
                number += 1
        except tf.errors.OpError as error:
            said = (
                f"{file} is damaged: record {number}, which begins at offset"
                f" {_record_offset(file, number)}: {reason(error)}; fetch the file again"
            )
            yield DamagedFile(shard, file, expected, said)
            continue
        if number != expected:
            said = f"{file} has {number} records; dataset_info.json says {expected}: fetch it again"
            yield DamagedFile(shard, file, expected, said)


def split_without(split: str, count: int, shards: Collection[int]) -> str:
    """The name that TFDS has for a split of ``count`` files without some of them.

    >>> split_without("train", 8, [0, 3, 4])
    'train[1shard:3shard]+train[5shard:8shard]'

    Raises:
      CorpusError: nothing is left of it.
    """
    edges = [-1, *sorted(shards), count]
    kept = [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if a + 1 < b]
    if not kept:
        raise CorpusError(f"all {count} files of split {split!r} are damaged")
    return "+".join(f"{split}[{first}shard:{last}shard]" for first, last in kept)


def reason(error: Exception) -> str:
    """What TensorFlow says, without the names of its operations."""
    said = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error), flags=re.DOTALL)
    return said or type(error).__name__


def _record_offset(file: str, number: int) -> int:
    """Where record ``number`` of a TFRecord file begins, counted from 0.

    A record is its length (8 bytes) and that number's checksum (4), the data and theirs (4).
    """
    offset = 0
    with tf.io.gfile.GFile(file, "rb") as stream:
        for _ in range(number):
            stream.seek(offset)
            offset += 16 + int.from_bytes(stream.read(8), "little")
    return offset
