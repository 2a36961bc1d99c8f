"""What to read, how to tokenize it, and where the token cache is."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from dataclasses import dataclass
from typing import Any, Literal

from fope_jax.data.retrieval import TASKS
from fope_jax.storage.paths import (
    SUPPORTED_PATHS,
    absolute_path,
    as_path,
    is_in_bucket,
    is_supported_path,
)

log = logging.getLogger(__name__)

Corpus = Literal["gutenberg", "c4", "text", "mixture", "none"]
Packing = Literal["documents", "windows"]
TaskTargets = Literal["answers", "all"]

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DataConfig:
    """The data of one experiment.

    Attributes:
      corpus: "gutenberg" (18 public-domain books, downloaded once), "c4" (the paper's), "text"
        (your files), "mixture" of these, or "none" if all rows are tasks.
      mixture: for corpus "mixture", entries "corpus=weight": ``("gutenberg=1", "c4=3")``. Weights
        are shares of training tokens. The mixture ends when the corpus whose turn it is has ended.
        Validation is every held-out document, whatever the weights.
      validation_books: gutenberg books held out; default: two novels and a play, 1.0 of 11.7 MB.
      excluded_books: gutenberg books in neither split. ``("bible-kjv",)`` removes 40% of the text.
      train_files: globs, local or ``gs://``. For "text": .txt (a file is a document), .jsonl or
        .json (a line is a document), each also with .gz, or .parquet (a row is a document). For
        "c4": the public ``c4-train.*.json.gz``, with ``tfds_data_dir`` empty.
      validation_files: globs of held-out files, none of them a training file.
      text_field: field of a line or column of a .parquet that holds the text.
      tfds_data_dir: for "c4", the TFDS directory that holds ``tfds_name``, as in
        ``"gs://bucket/tensorflow_datasets"``. In a mixture, c4 is always read from here.
      tfds_name: the prepared TFDS dataset, with its version.
      max_tokens, max_documents: of the training split; it ends with the document that reaches one
        of them, which is whole. The paper's C4 is ``max_tokens = 10_000_000_000``. Every file of
        text that is named is looked through, so name about as many as it takes; of TFDS those that
        are read.
      max_bad_documents: unreadable documents allowed in each split of "text" and "c4" files: bad
        UTF-8 or JSON, no text, too long. A config that allows fewer does not open the cache.
      max_damaged_files: the same for files: damaged .gz or TFRecord files, or another content than
        the name says, such as a Git LFS pointer. They are found before any of their documents is
        used.
      tokenizer: "sentencepiece" (BPE trained on the training split), "bytes", or a path to a
        ``tokenizer.json``.
      vocab_size: tokens of the "sentencepiece" tokenizer; ignored by the others.
      cache_dir: for downloads and token caches. One in a bucket (``gs://``) is built locally and
        uploaded; it is read from there by range.
      copy_shards: whether a machine that reads a cache in a bucket also copies, once, the shards
        that it uses; it then reads those. Without it only 1% is copied, the indices.
      packing: "documents": each document in a window is a segment with positions from 0. "windows":
        a window is one segment, as in the paper's code.
      max_repeats: R: a row of text that holds one sequence of 1 to ``repeat_tokens`` tokens R times
        in a row or more has weight 0: OLMo's instance filter, 32 there. None: every row counts.
      repeat_tokens: tokens of the longest sequence that is looked for.
      tasks: entries "task=share", shares of each batch's rows that are windows of retrieval tasks:
        ``("recall=0.25", "copy=0.25")``; the rest is text. Items of the evaluation are never drawn.
      task_targets: which tokens of a task's windows are learnt: "answers" or "all".
    """

    corpus: Corpus = "gutenberg"
    mixture: tuple[str, ...] = ()
    validation_books: tuple[str, ...] = (
        "austen-persuasion",
        "chesterton-ball",
        "shakespeare-macbeth",
    )
    excluded_books: tuple[str, ...] = ()
    train_files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    text_field: str = "text"
    tfds_data_dir: str = ""
    tfds_name: str = "c4/en:3.0.1"
    max_tokens: int | None = None
    max_documents: int | None = None
    max_bad_documents: int = 0
    max_damaged_files: int = 0
    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    cache_dir: str = "data_cache"
    copy_shards: bool = True
    packing: Packing = "documents"
    max_repeats: int | None = None
    repeat_tokens: int = 13
    tasks: tuple[str, ...] = ()
    task_targets: TaskTargets = "answers"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # configuration files have lists
                object.__setattr__(self, field.name, tuple(value))
        choices = {"corpus": Corpus, "packing": Packing, "task_targets": TaskTargets}
        for name, choice in choices.items():
            accepted = typing.get_args(choice)
            self._require(name, getattr(self, name) in accepted, accepted)
        self._require("vocab_size", self.vocab_size >= 1, "an integer of 1 or more")
        for name in ("max_tokens", "max_documents"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "an integer of 1 or more, or none")
        self._require("max_bad_documents", self.max_bad_documents >= 0, "0 or more")
        self._require("max_damaged_files", self.max_damaged_files >= 0, "0 or more")
        accepted = "an integer of 3 or more, or none"
        self._require("max_repeats", self.max_repeats is None or self.max_repeats >= 3, accepted)
        self._require("repeat_tokens", self.repeat_tokens >= 1, "an integer of 1 or more")
        self._require("text_field", bool(self.text_field), "the name of a field")
        self._require("cache_dir", bool(self.cache_dir), "a directory")
        for name in ("cache_dir", "tokenizer", "train_files", "validation_files"):
            value = getattr(self, name)
            paths = [value] if isinstance(value, str) else value
            self._require(name, all(map(is_supported_path, paths)), SUPPORTED_PATHS)
        self._require(
            "tokenizer",
            self.tokenizer in ("sentencepiece", "bytes") or self.tokenizer.endswith(".json"),
            "'sentencepiece', 'bytes' or the path of a tokenizer.json",
        )
        self._check_tasks()
        self._check_corpora()

    @property
    def components(self) -> tuple[tuple[str, float], ...]:
        """The corpora with their shares of the training tokens (1 for a single corpus).

        >>> mixture = ("gutenberg=1", "c4=3")
        >>> DataConfig(corpus="mixture", mixture=mixture, tfds_data_dir="gs://b/d").components
        (('c4', 3.0), ('gutenberg', 1.0))
        """
        if self.corpus != "mixture":
            return ((self.corpus, 1.0),)
        # Sorted: the order of the entries must not change the tokens.
        return tuple(sorted(_name_and_share(entry) for entry in self.mixture))

    @property
    def task_shares(self) -> tuple[tuple[str, float], ...]:
        """Retrieval tasks with their shares of the rows of a batch.

        >>> DataConfig(tasks=("recall=0.25", "copy=0.5")).task_shares
        (('recall', 0.25), ('copy', 0.5))
        """
        return tuple(_name_and_share(entry) for entry in self.tasks)

    def _require(self, field: str, condition: bool, accepted: Any) -> None:
        if not condition:
            raise ValueError(
                f"{field} = {getattr(self, field)!r} with corpus = {self.corpus!r}; accepted:"
                f" {accepted}"
            )

    def _check_tasks(self) -> None:
        names = [name for name, _ in self.task_shares]
        shares = [share for _, share in self.task_shares]
        known = set(names) <= set(TASKS) and len(set(names)) == len(names)
        accepted = f"entries 'task=share', each once, a task of {TASKS} and a positive share"
        self._require("tasks", known and all(share > 0 for share in shares), accepted)
        if self.corpus == "none":
            self._require("tasks", abs(sum(shares) - 1) < 1e-6, "shares that sum to 1")
            self._require("tokenizer", self.tokenizer == "bytes", "'bytes': there is no text")
        else:
            self._require("tasks", sum(shares) < 1 - 1e-6, "shares that leave some for the text")

    def _check_corpora(self) -> None:
        is_mixture = self.corpus == "mixture"
        entries = "entries 'corpus=weight' with corpus = 'mixture', nothing otherwise"
        self._require("mixture", bool(self.mixture) == is_mixture, entries)
        corpora = [name for name, _ in self.components]
        if is_mixture:
            single = [name for name in typing.get_args(Corpus) if name not in ("mixture", "none")]
            weighted = all(c in single and 0 < w < float("inf") for c, w in self.components)
            accepted = f"entries 'corpus=weight', a corpus of {single} and a positive weight"
            self._require("mixture", weighted, accepted)
            self._require("mixture", len(set(corpora)) == len(corpora), "each corpus once")
        for field in ("train_files", "validation_files"):
            is_read = not getattr(self, field) or {"text", "c4"} & {*corpora}
            self._require(
                field,
                bool(is_read),
                f"none, --config.data.{field}= ; files are read with corpus = 'text'",
            )
        for name in corpora:
            if name == "gutenberg":
                books, both = (
                    self.validation_books,
                    {*self.validation_books} & {*self.excluded_books},
                )
                self._require("validation_books", bool(books), "at least one book")
                self._require("excluded_books", not both, f"no validation book; {sorted(both)} are")
            elif name == "c4" and (self.tfds_data_dir or is_mixture):
                self._require("tfds_data_dir", bool(self.tfds_data_dir), "a TFDS data directory")
                alone = is_mixture or not (self.train_files or self.validation_files)
                self._require("tfds_data_dir", alone, "empty where c4 is read from train_files")
            elif name != "none":
                hint = " (or tfds_data_dir)" if name == "c4" else ""
                files = "globs of .txt, .jsonl, .json or .parquet files, as --config.data"
                train = f"{files}.train_files='notes/*.txt'{hint}"
                self._require("train_files", bool(self.train_files), train)
                held_out = f"{files}.validation_files='held_out/*.txt', no training files"
                self._require("validation_files", bool(self.validation_files), held_out)


def _name_and_share(entry: str) -> tuple[str, float]:
    """Parses "name=share"; the share is 0 if it is not a number."""
    name, _, share = entry.partition("=")
    try:
        return name, float(share)
    except ValueError:
        return name, 0.0


def with_tokenizer_beside(config: DataConfig, directory: str | os.PathLike[str]) -> DataConfig:
    """``config`` of a run in ``directory``, with the run's own tokenizer.json if its file is gone.

    config.json names an absolute path; a run that was moved or copied has the file beside it.
    """
    name = config.tokenizer
    if not name.endswith(".json") or is_in_bucket(name) or as_path(name).is_file():
        return config
    own = absolute_path(directory) / "tokenizer.json"
    if not own.is_file():
        return config
    log.info("data.tokenizer = %r is not there: %s is read", name, own)
    return dataclasses.replace(config, tokenizer=str(own))
