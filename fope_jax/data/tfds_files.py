"""A dataset prepared by TFDS: its directory, identity and files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError
from fope_jax.data.tf_libraries import tf, tfds
from fope_jax.storage.content import HEAD_BYTES, detect_content


def dataset_directory(config: DataConfig) -> str:
    """The directory of the prepared dataset, read in place; CorpusError if it is unreachable."""
    name, _, version = config.tfds_name.partition(":")
    directory = "/".join((config.tfds_data_dir.rstrip("/"), name, version)).rstrip("/")
    try:
        there = tf.io.gfile.exists(f"{directory}/dataset_info.json")
    except tf.errors.OpError as error:  # a bucket is missing or unreachable
        raise CorpusError(
            f"tfds_data_dir = {config.tfds_data_dir!r} cannot be read: {error_text(error)}"
        ) from error
    if not there:
        raise CorpusError(
            f"tfds_data_dir = {config.tfds_data_dir!r} holds no prepared {config.tfds_name}:"
            f" {directory}/dataset_info.json does not exist"
        )
    return directory


def dataset_identity(config: DataConfig) -> list[list[Any]]:
    """What identifies the content of a TFDS corpus without reading all of it."""
    directory = dataset_directory(config)
    digest = hashlib.sha256()
    for file in ("dataset_info.json", "features.json"):
        with tf.io.gfile.GFile(f"{directory}/{file}", "rb") as stream:
            content = stream.read()
        if found := detect_content(content[:HEAD_BYTES]):
            raise CorpusError(f"{directory}/{file} is {found.kind}; {found.advice}")
        digest.update(content)
    splits = tfds.builder_from_directory(directory).info.splits
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise CorpusError(f"{directory} has no split {missing}; it has {sorted(splits)}")
    return [[config.tfds_name, digest.hexdigest()]] + [
        [split, splits[split].num_examples, list(splits[split].shard_lengths)] for split in SPLITS
    ]


class TfdsFile(NamedTuple):
    """A file of a split: its number from 0, its path, and its number of documents."""

    shard: int
    path: str
    documents: int


def list_files(config: DataConfig, split: str) -> list[TfdsFile]:
    """The non-empty TFRecord files of a split; none if it has another format."""
    builder = tfds.builder_from_directory(dataset_directory(config))
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        return []
    info = builder.info.splits[split]
    pairs = zip(map(str, info.filepaths), info.shard_lengths, strict=True)
    return [TfdsFile(shard, path, count) for shard, (path, count) in enumerate(pairs) if count]


def size_and_mtime(file: TfdsFile) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change; CorpusError if unreadable."""
    try:
        status = tf.io.gfile.stat(file.path)
    except tf.errors.OpError as error:
        raise CorpusError(f"{file.path} cannot be read: {error_text(error)}") from error
    return int(status.length), int(status.mtime_nsec)


def is_checked_when_read(config: DataConfig, split: str) -> bool:
    """Whether the build looks through a file of a split only when it comes to it.

    Of a part of the split most files are not read. With ``max_damaged_files`` all are looked
    through first, since which files are left out decides the order of the documents.
    """
    has_limit = config.max_tokens is not None or config.max_documents is not None
    return split == "train" and has_limit and config.max_damaged_files == 0


class ReadFiles:
    """Looks through the files of a split when their first documents are read."""

    def __init__(self, config: DataConfig, split: str):
        self._left = list_files(config, split)
        self._shards = {file.path.rpartition("/")[2]: file.shard for file in self._left}

    def check(self, tfds_ids: Iterable[bytes]) -> None:
        """Raises CorpusError if a file of these documents, ``NAME__NUMBER``, or before is damaged.

        Before: a file that is cut at its beginning has no document.
        """
        names = {one.decode().rpartition("__")[0].rpartition("/")[2] for one in tfds_ids}
        last = max(self._shards.get(name, len(self._shards)) for name in names)
        while self._left and self._left[0].shard <= last:
            if damage := find_damage(self._left.pop(0)):
                raise CorpusError(damage)


def find_damage(file: TfdsFile) -> str:
    """Why a file is damaged or cut between two records, or ""; CorpusError if it is unreadable.

    TensorFlow may miss a cut, and then yields the documents of all files in another order.
    """
    try:
        batches = tf.data.TFRecordDataset(file.path).batch(256)
        count = sum(int(tf.size(batch)) for batch in batches)
    except tf.errors.DataLossError:
        return _describe_damage(file)
    except tf.errors.OpError as error:
        raise CorpusError(f"{file.path} cannot be read: {error_text(error)}") from error
    if count == file.documents:
        return ""
    return (
        f"{file.path} has {count:,} records; dataset_info.json says {file.documents:,}:"
        " fetch it again"
    )


def _describe_damage(file: TfdsFile) -> str:
    # Only after a failure: a sound file begins with a number, which may look like another format.
    with tf.io.gfile.GFile(file.path, "rb") as stream:
        if found := detect_content(stream.read(HEAD_BYTES)):
            return f"{file.path} is no TFRecord file: it is {found.kind}; {found.advice}"
    number = offset = 0
    try:
        for record in tf.data.TFRecordDataset(file.path).as_numpy_iterator():
            # A record: length (8 bytes), its checksum (4), data, its checksum (4).
            number, offset = number + 1, offset + 16 + len(record)
        return f"{file.path} is damaged; fetch the file again"
    except tf.errors.DataLossError as error:
        return (
            f"{file.path} is damaged: record {number:,} of {file.documents:,}, which begins at"
            f" offset {offset}: {error_text(error)}; fetch the file again"
        )


def split_without(config: DataConfig, split: str, left_out: Collection[str]) -> str:
    """TFDS's name for a split without some files; CorpusError if none is left."""
    files = list_files(config, split) if left_out else []
    out = [file.shard for file in files if file.path in left_out]
    if not out:
        return split
    if len(out) == len(files):
        raise CorpusError(f"all {len(files)} files of split {split!r} are damaged: {files[0].path}")
    return shard_slices(split, files[-1].shard + 1, out)


def shard_slices(split: str, count: int, without: Collection[int]) -> str:
    """TFDS's name for ``count`` shards of a split except some.

    >>> shard_slices("train", 8, [0, 3, 4])
    'train[1shard:3shard]+train[5shard:8shard]'
    """
    edges = [-1, *sorted(without), count]
    kept = [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if a + 1 < b]
    return "+".join(f"{split}[{first}shard:{last}shard]" for first, last in kept)


def error_text(error: Exception) -> str:
    """TensorFlow's message without names of operations."""
    said = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(error), flags=re.DOTALL)
    return said or type(error).__name__
