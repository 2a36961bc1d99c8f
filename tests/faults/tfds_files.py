"""C4 as TFDS prepares it, small; and where the records of its files begin."""

from __future__ import annotations

from pathlib import Path

from fope_jax.data.tf_libraries import tf, tfds

PAGE = {"content-type": "text/plain", "content-length": "1", "timestamp": "2019-04-25"}


def prepare_c4(directory: Path, splits: dict[str, list[str]], examples_per_file: int) -> Path:
    """A TFDS data directory with C4 of these texts in several files, as TFDS itself writes it."""
    version = directory / "tfds" / "c4" / "en" / "3.0.1"
    version.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name="c4",
            config_name="en",
            version=tfds.core.Version("3.0.1"),
            module_name="",
            data_dir=str(version),
        ),
        features=tfds.features.FeaturesDict(
            {key: tfds.features.Text() for key in (*PAGE, "text", "url")}
        ),
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=examples_per_file)
    writer.initialize_splits(list(splits))
    for split, texts in splits.items():
        urls = [f"https://{split}.example/{number}" for number in range(len(texts))]
        pairs = zip(texts, urls, strict=True)
        writer.add_examples({split: [PAGE | {"text": text, "url": url} for text, url in pairs]})
    writer.close_all()
    return directory / "tfds"


def record_offsets(path: Path) -> list[int]:
    """Where each record begins: a length of 8 bytes, its checksum of 4, data, a checksum of 4."""
    content, offsets = path.read_bytes(), [0]
    while (offset := offsets[-1]) < len(content):
        offsets.append(offset + 16 + int.from_bytes(content[offset : offset + 8], "little"))
    return offsets[:-1]


def texts_of(path: Path) -> list[str]:
    """The texts of one of its files."""
    examples = [
        tf.train.Example.FromString(record)
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    ]
    return [e.features.feature["text"].bytes_list.value[0].decode() for e in examples]
