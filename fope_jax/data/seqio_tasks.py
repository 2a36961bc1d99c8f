"""Corpora as seqio Tasks and Mixtures for other code, and the source by which a build reads C4.

Without a sequence length a Task yields whole documents, those that `fope_jax.data.tokenized` gives
a build. With one it yields windows that keep every token; seqio would keep the first window of each
document and drop the rest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fope_jax.data import tfds_files
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, Document, read_corpus
from fope_jax.data.documents import (
    DOCUMENTS_AT_ONCE,
    encode_group,
    group_documents,
    interleave_by_tokens,
)
from fope_jax.data.tf_libraries import seqio, tf, tfds
from fope_jax.data.tokenizers import Tokenizer


def register_tasks(config: DataConfig, tokenizer: Tokenizer):
    """Registers a seqio Task for each corpus of ``config``; returns it, or the Mixture of them.

    Examples have ``targets`` (int32, EOS at the end) and, without a sequence length, the other
    fields of a document. Earlier tasks of the same name are replaced.
    """
    failures: list[Exception] = []
    tasks = []
    for corpus, _ in config.components:
        name = f"fope_{corpus}"
        seqio.TaskRegistry.remove(name)
        tasks.append(
            seqio.TaskRegistry.add(
                name,
                source=_source(config, corpus, failures, ()),
                preprocessors=[
                    functools.partial(_label, corpus=corpus),
                    functools.partial(tokenize, tokenizer=tokenizer, failures=failures),
                    concatenate_and_split,
                ],
                output_features={
                    "targets": seqio.Feature(
                        seqio.PassThroughVocabulary(tokenizer.vocab_size, tokenizer.eos_id),
                        add_eos=False,  # documents have it already
                    )
                },
            )
        )
    if config.corpus != "mixture":
        return tasks[0]
    seqio.MixtureRegistry.remove("fope_mixture")
    return seqio.MixtureRegistry.add(
        "fope_mixture",
        list(zip([task.name for task in tasks], [w for _, w in config.components], strict=True)),
        sample_fn=sample_by_tokens,  # in the order of seqio, which sorts tasks by name
    )


def read_texts(
    config: DataConfig, corpus: str, split: str, left_out: Collection[str] = (), skip: int = 0
) -> Iterator[Document]:
    """The documents of a corpus, from number ``skip``, in the order of its Task.

    CorpusError: truncated TFDS files, or unreadable text if ``max_bad_documents`` is 0.
    """
    failures: list[Exception] = []
    is_tfds = corpus == "c4" and bool(config.tfds_data_dir)
    files = None
    if is_tfds and tfds_files.is_checked_when_read(config, split):
        files = tfds_files.ReadFiles(config, split)
    try:
        source = _source(config, corpus, failures, left_out)
        with _tfds_ids() if files else contextlib.nullcontext():
            dataset = source.get_dataset(split=split, shuffle=False).skip(skip)
        # In groups: a step from TensorFlow to Python takes up to a millisecond.
        for group in dataset.batch(DOCUMENTS_AT_ONCE).as_numpy_iterator():
            if files:
                files.check(group["tfds_id"])
            names = group["name" if "name" in group else "url"]
            reasons = group.get("bad", [b""] * len(names))
            for name, text, bad in zip(names, group["text"], reasons, strict=True):
                yield Document(name.decode(), _decode(name, text), bad.decode())
    except tf.errors.OpError as error:
        raise _corpus_error(error, failures, config, split) from error


@contextlib.contextmanager
def _tfds_ids() -> Iterator[None]:
    """Datasets that are made in the block tell the file of each document, as ``tfds_id``."""
    seqio.set_tfds_read_config_override(tfds.ReadConfig(add_tfds_id=True))
    try:
        yield
    finally:
        seqio.set_tfds_read_config_override(None)


def _source(config: DataConfig, corpus: str, failures: list[Exception], left_out: Collection[str]):
    if corpus == "c4" and config.tfds_data_dir:
        splits = {s: tfds_files.split_without(config, s, left_out) for s in SPLITS}
        return seqio.TfdsDataSource(
            tfds_data_dir=tfds_files.dataset_directory(config), splits=splits, read_only=True
        )

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None):
        del shuffle_files, seed  # the loader shuffles windows, not documents
        documents = functools.partial(read_corpus, config, corpus, split, left_out)
        return tf.data.Dataset.from_generator(
            functools.partial(_as_examples, documents, failures),
            output_signature={name: tf.TensorSpec((None,), tf.string) for name in Document._fields},
        ).unbatch()

    return seqio.FunctionDataSource(dataset_fn, splits=SPLITS)


def _as_examples(
    documents: Callable[[], Iterator[Document]], failures: list[Exception]
) -> Iterator[dict[str, list[str]]]:
    """Documents in groups: a step from Python into TensorFlow takes up to a millisecond."""
    try:
        for group in group_documents(documents()):
            yield {name: [getattr(one, name) for one in group] for name in Document._fields}
    except Exception as error:  # TensorFlow keeps only the text of an exception
        failures.append(error)
        raise


def _corpus_error(error: Exception, failures: list[Exception], config: DataConfig, split: str):
    """The exception to raise instead of TensorFlow's, which names no file."""
    if failures:
        return failures[0]
    for file in tfds_files.list_files(config, split) if config.tfds_data_dir else ():
        if damage := tfds_files.find_damage(file):  # damaged since the build checked them
            return CorpusError(damage)
    said = tfds_files.error_text(error)
    return CorpusError(f"reading split {split!r} of corpus {config.corpus!r} failed: {said}")


def _label(dataset, corpus: str):
    """Keeps text and name (TFDS: the URL)."""
    return dataset.map(
        lambda example: {
            "corpus": tf.constant(corpus),
            "name": example["name"] if "name" in example else example["url"],
            "text": example["text"],
            "bad": example["bad"] if "bad" in example else tf.constant(""),
        }
    )


def tokenize(dataset, tokenizer: Tokenizer, failures: list[Exception]):
    """Replaces ``text`` by ``targets``: tokens and EOS, in groups to use every core."""

    def encode(names: np.ndarray, texts: np.ndarray):
        try:
            return encode_group(tokenizer, list(map(_decode, names, texts)))
        except Exception as error:
            failures.append(error)
            raise

    def encode_batch(batch):
        types = (tf.int32, tf.int64, tf.int64, tf.bool)
        inputs = [batch["name"], batch["text"]]
        columns = tf.numpy_function(encode, inputs, types, stateful=False)
        for column in columns:
            column.set_shape([None])
        flat, lengths, sizes, changed = columns
        targets = tf.RaggedTensor.from_row_lengths(flat, lengths, validate=False)
        kept = {name: batch[name] for name in ("corpus", "name", "bad")}
        return kept | {"bytes": sizes, "changed": changed, "targets": targets}

    # Prefetch before the tokenizer and before the writer.
    batches = dataset.batch(DOCUMENTS_AT_ONCE).prefetch(2).map(encode_batch).prefetch(2)
    return batches.unbatch().map(lambda x: x | {"targets": tf.convert_to_tensor(x["targets"])})


def _decode(name: bytes, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"document {name.decode(errors='replace')!r} is not UTF-8: byte"
            f" 0x{text[error.start]:02x} at offset {error.start} ({error.reason})"
        ) from error


def concatenate_and_split(dataset, sequence_length: Mapping[str, int] | None = None):
    """Joins documents and cuts the stream into ``sequence_length["targets"]`` tokens.

    The last window is shorter; empty documents leave no token. Without a length nothing changes.
    """
    if not sequence_length:
        return dataset
    length = sequence_length["targets"]
    dataset = dataset.filter(lambda x: x["bytes"] > 0)
    tokens = dataset.flat_map(lambda x: tf.data.Dataset.from_tensor_slices(x["targets"]))
    return tokens.batch(length).map(lambda window: {"targets": window})


def sample_by_tokens(datasets: Sequence[Any], rates: Sequence[float], seed: int | None):
    """`interleave_by_tokens` as the ``sample_fn`` of a seqio Mixture; the seed is not used."""
    del seed

    def generate():
        iterators = [dataset.as_numpy_iterator() for dataset in datasets]
        return interleave_by_tokens(iterators, rates, [0] * len(rates))

    return tf.data.Dataset.from_generator(generate, output_signature=datasets[0].element_spec)
