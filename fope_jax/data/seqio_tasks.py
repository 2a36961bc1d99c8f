"""Corpora as seqio Tasks; imports TensorFlow, so only the build imports this module.

Without a sequence length a Task yields whole documents, for the cache. With one it yields windows
that keep every token; seqio would keep the first window of each document and drop the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fope_jax.data import tfds_files
from fope_jax.data.config import SPLITS, DataConfig
from fope_jax.data.corpora import CorpusError, Document, read_corpus
from fope_jax.data.documents import (
    DOCUMENTS_AT_ONCE,
    TokenizedDocument,
    encode_group,
    interleave_by_tokens,
)
from fope_jax.data.tf_libraries import seqio, tf
from fope_jax.data.tokenizers import Tokenizer

_CHARS_AT_ONCE = 4_000_000
_FEATURES = ("corpus", "name", "bytes", "bad", "changed")


def register_tasks(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    skip: Mapping[str, int] = {},
    taken: Mapping[str, int] = {},
    left_out: Collection[str] = (),
    failures: list[Exception] | None = None,
):
    """Registers a seqio Task for each corpus of ``config``; returns it, or the Mixture of them.

    Examples have ``targets`` (int32, EOS at the end) and, without a sequence length, the other
    fields of `TokenizedDocument`. Earlier tasks of the same name are replaced.

    Args:
      skip, taken: documents and tokens of each corpus that were read before.
      left_out: paths of files that are not read.
      failures: receives exceptions, of which TensorFlow would keep only the text.
    """
    failures = [] if failures is None else failures
    tasks = []
    for corpus, _ in config.components:
        name = f"fope_{corpus}"
        seqio.TaskRegistry.remove(name)
        tasks.append(
            seqio.TaskRegistry.add(
                name,
                source=_source(config, corpus, failures, left_out),
                preprocessors=[
                    functools.partial(_label_and_skip, corpus=corpus, skip=skip.get(corpus, 0)),
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
        # In the order of seqio, which sorts tasks by name.
        sample_fn=functools.partial(
            sample_by_tokens, taken=[taken.get(corpus, 0) for corpus, _ in config.components]
        ),
    )


def read_documents(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    *,
    skip: Mapping[str, int] = {},
    taken: Mapping[str, int] = {},
    left_out: Collection[str] = (),
) -> Iterator[TokenizedDocument]:
    """The tokenized documents of one split, read through the Tasks in a fixed order.

    A training mixture follows its weights, a validation mixture goes corpus by corpus. CorpusError:
    truncated TFDS files, or unreadable text if ``max_bad_documents`` is 0.
    """
    failures: list[Exception] = []
    provider = register_tasks(
        config, tokenizer, skip=skip, taken=taken, left_out=left_out, failures=failures
    )
    if config.corpus == "mixture" and split == "train":
        options = {"num_epochs": 1, "passthrough_features": _FEATURES}
        datasets = [provider.get_dataset(None, split=split, shuffle=False, **options)]
    else:
        tasks = provider.tasks if config.corpus == "mixture" else [provider]
        options = {"shuffle": False, "try_in_mem_cache": False}
        datasets = [task.get_dataset(None, split=split, **options) for task in tasks]
    try:
        # In groups: a step from TensorFlow to Python takes up to a millisecond.
        for group in (g for dataset in datasets for g in dataset.ragged_batch(DOCUMENTS_AT_ONCE)):
            ends = group["targets"].row_splits.numpy()
            tokens = np.split(group["targets"].flat_values.numpy(), ends[1:-1])
            columns = (group[name].numpy() for name in _FEATURES)
            for corpus, name, size, bad, changed, ids in zip(*columns, tokens, strict=True):
                yield TokenizedDocument(
                    corpus.decode(), name.decode(), ids, int(size), bad.decode(), bool(changed)
                )
    except tf.errors.OpError as error:
        raise _corpus_error(error, failures, config, split) from error


def read_texts(
    config: DataConfig, corpus: str, split: str, left_out: Collection[str] = ()
) -> Iterator[str]:
    """The texts of a corpus, to train a tokenizer on."""
    failures: list[Exception] = []
    try:
        dataset = _source(config, corpus, failures, left_out).get_dataset(
            split=split, shuffle=False
        )
        for group in dataset.batch(DOCUMENTS_AT_ONCE).as_numpy_iterator():
            names = group["name" if "name" in group else "url"]
            for name, text in zip(names, group["text"], strict=True):
                yield _decode(name, text)
    except tf.errors.OpError as error:
        raise _corpus_error(error, failures, config, split) from error


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

    def columns(group: list[Document]) -> dict[str, list[str]]:
        return {name: [getattr(one, name) for one in group] for name in Document._fields}

    try:
        group, size = [], 0
        for document in documents():
            group.append(document)
            size += len(document.text)
            if len(group) == DOCUMENTS_AT_ONCE or size >= _CHARS_AT_ONCE:
                yield columns(group)
                group, size = [], 0
        if group:
            yield columns(group)
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


def _label_and_skip(dataset, corpus: str, skip: int):
    """Keeps text and name (TFDS: the URL) and skips documents."""
    labelled = dataset.map(
        lambda example: {
            "corpus": tf.constant(corpus),
            "name": example["name"] if "name" in example else example["url"],
            "text": example["text"],
            "bad": example["bad"] if "bad" in example else tf.constant(""),
        }
    )
    return labelled.skip(skip)


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


def sample_by_tokens(
    datasets: Sequence[Any], rates: Sequence[float], seed: int | None, *, taken: Sequence[int]
):
    """`interleave_by_tokens` as the ``sample_fn`` of a seqio Mixture; the seed is not used."""
    del seed

    def generate():
        iterators = [dataset.as_numpy_iterator() for dataset in datasets]
        return interleave_by_tokens(iterators, rates, taken)

    return tf.data.Dataset.from_generator(generate, output_signature=datasets[0].element_spec)
