"""What to read, how to cut it into tokens, and where the token cache goes."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from fope_jax.data.retrieval import TASKS
from fope_jax.storage.paths import SUPPORTED_PATHS, is_supported_path

Corpus = Literal["gutenberg", "c4", "text", "mixture", "none"]
Packing = Literal["documents", "windows"]
TaskTargets = Literal["answers", "all"]

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class DataConfig:
    """The data of one experiment.

    Attributes:
      corpus: "gutenberg" (18 public-domain books, downloaded once), "c4" (the paper's), "text"
        (files of your own) or "mixture" of those; "none" where every row of a batch is a task's.
      mixture: for corpus "mixture", entries "corpus=weight": ``("gutenberg=1", "c4=3")``. Weights
        are shares of training tokens. The mixture ends where the corpus whose turn it is has no
        document left; what the others have beyond that is not used. Validation is every held-out
        document of every corpus, whatever the weights.
      validation_books: gutenberg books held out whole. The default is a novel each by two authors
        (135,000 and 143,000 tokens with the default tokenizer) and a play, 1.0 MB of 11.7 MB.
      excluded_books: gutenberg books left out of both splits; none by default. ``("bible-kjv",)``
        takes out 40% of the training text, in verses unlike the other books.
      train_files: globs, of this machine or ``gs://``. For "text": .txt (a file is a document) and
        .jsonl or .json, each also with .gz (a line is a document, its field ``text``). For "c4":
        the public ``c4-train.*.json.gz``; leave ``tfds_data_dir`` empty then.
      validation_files: globs of held-out files, none of them a training file.
      tfds_data_dir: for "c4", the TFDS directory that holds ``tfds_name``, as in
        ``"gs://bucket/tensorflow_datasets"``. In a mixture, c4 is always read from here and the
        files belong to "text".
      tfds_name: the prepared TFDS dataset, with its version.
      max_bad_documents: documents of "text" and "c4" files that may be left out of each split
        because they cannot be read: no UTF-8, no JSON, no ``text``, or too long. 0 stops at the
        first. They are counted in the cache, which a stricter configuration does not open.
      max_damaged_files: files that may be left out of each split because they are damaged, as .gz
        files and TFRecord files of a TFDS dataset can be, or hold something else than their name
        says, such as a Git LFS pointer. 0 stops before the first document. They are named in the
        cache, which a stricter configuration does not open.
      tokenizer: "sentencepiece" (BPE trained on the training split), "bytes", or the path of a
        ``tokenizer.json``.
      vocab_size: tokens of the "sentencepiece" tokenizer; the others bring their own number.
      cache_dir: where downloads and token caches go. One in a bucket (``gs://``) is built on this
        machine and then uploaded, and copied once to every machine that reads it.
      packing: how windows see documents. "documents": segments, and positions from 0, for each
        document in a window. "windows": one segment a window, as the paper's code does.
      tasks: entries "task=share": how many rows of every training batch are windows of a retrieval
        task, such as ``("recall=0.25", "copy=0.25")``; the rest is text. Each is drawn anew,
        and none of the evaluation's items is ever among them (`fope_jax.data.retrieval`).
      task_targets: what is learnt of a task's windows: "answers", or "all" of their tokens.
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
    tfds_data_dir: str = ""
    tfds_name: str = "c4/en:3.0.1"
    max_bad_documents: int = 0
    max_damaged_files: int = 0
    tokenizer: str = "sentencepiece"
    vocab_size: int = 4096
    cache_dir: str = "data_cache"
    packing: Packing = "documents"
    tasks: tuple[str, ...] = ()
    task_targets: TaskTargets = "answers"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # configuration files write lists
                object.__setattr__(self, field.name, tuple(value))
        _require(self, "corpus", self.corpus in typing.get_args(Corpus), typing.get_args(Corpus))
        _require(
            self, "packing", self.packing in typing.get_args(Packing), typing.get_args(Packing)
        )
        targets = typing.get_args(TaskTargets)
        _require(self, "task_targets", self.task_targets in targets, targets)
        self._check_tasks()
        _require(self, "vocab_size", self.vocab_size >= 1, "an integer of 1 or more")
        for name in ("max_bad_documents", "max_damaged_files"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "cache_dir", bool(self.cache_dir), "a directory")
        for name in ("cache_dir", "tokenizer", "train_files", "validation_files"):
            value = getattr(self, name)
            paths = [value] if isinstance(value, str) else value
            _require(self, name, all(map(is_supported_path, paths)), SUPPORTED_PATHS)
        _require(
            self,
            "tokenizer",
            self.tokenizer in ("sentencepiece", "bytes") or self.tokenizer.endswith(".json"),
            "'sentencepiece', 'bytes' or the path of a tokenizer.json",
        )
        _require(
            self,
            "mixture",
            bool(self.mixture) == (self.corpus == "mixture"),
            "entries 'corpus=weight' with corpus = 'mixture', nothing otherwise",
        )
        corpora = [name for name, _ in self.components]
        _require(self, "mixture", len(set(corpora)) == len(corpora), "each corpus once")
        for name in corpora:
            self._check_corpus(name)

    @property
    def components(self) -> tuple[tuple[str, float], ...]:
        """The corpora with their shares of the training tokens (1 for a single corpus).

        >>> mixture = ("gutenberg=1", "c4=3")
        >>> DataConfig(corpus="mixture", mixture=mixture, tfds_data_dir="gs://b/d").components
        (('c4', 3.0), ('gutenberg', 1.0))
        """
        if self.corpus != "mixture":
            return ((self.corpus, 1.0),)
        # Sorted, because the order of the entries must not change which tokens come out.
        return tuple(sorted(self._parse_component(entry) for entry in self.mixture))

    def _parse_component(self, entry: str) -> tuple[str, float]:
        name, share = _name_and_share(entry)
        single = [name for name in typing.get_args(Corpus) if name not in ("mixture", "none")]
        _require(
            self,
            "mixture",
            name in single and 0 < share < float("inf"),
            f"entries 'corpus=weight', a corpus of {single} and a positive weight",
        )
        return name, share

    @property
    def task_shares(self) -> tuple[tuple[str, float], ...]:
        """Retrieval tasks with their shares of the rows of a batch.

        >>> DataConfig(tasks=("recall=0.25", "copy=0.5")).task_shares
        (('recall', 0.25), ('copy', 0.5))
        """
        return tuple(_name_and_share(entry) for entry in self.tasks)

    def _check_tasks(self) -> None:
        names, shares = zip(*self.task_shares, strict=True) if self.tasks else ((), ())
        known = set(names) <= set(TASKS) and len(set(names)) == len(names)
        accepted = f"entries 'task=share', each once, a task of {TASKS} and a positive share"
        _require(self, "tasks", known and all(share > 0 for share in shares), accepted)
        if self.corpus == "none":
            _require(self, "tasks", abs(sum(shares) - 1) < 1e-6, "shares that sum to 1")
            _require(self, "tokenizer", self.tokenizer == "bytes", "'bytes': there is no text")
        else:
            _require(self, "tasks", sum(shares) < 1 - 1e-6, "shares that leave some for the text")

    def _check_corpus(self, name: str) -> None:
        if name == "none":
            return
        if name == "gutenberg":
            _require(self, "validation_books", bool(self.validation_books), "at least one book")
            both = sorted(set(self.validation_books) & set(self.excluded_books))
            _require(self, "excluded_books", not both, f"no validation book; {both} are")
        elif name == "c4" and (self.tfds_data_dir or self.corpus == "mixture"):
            _require(self, "tfds_data_dir", bool(self.tfds_data_dir), "a TFDS data directory")
            alone = self.corpus == "mixture" or not (self.train_files or self.validation_files)
            _require(self, "tfds_data_dir", alone, "empty where c4 is read from train_files")
        else:
            hint = " (or tfds_data_dir)" if name == "c4" else ""
            _require(self, "train_files", bool(self.train_files), f"globs{hint}")
            _require(
                self, "validation_files", bool(self.validation_files), "globs of held-out files"
            )


def _name_and_share(entry: str) -> tuple[str, float]:
    """Both sides of "name=share"; a share of 0 where it is no number."""
    name, _, share = entry.partition("=")
    try:
        return name, float(share)
    except ValueError:
        return name, 0.0


def _require(config: DataConfig, field: str, condition: bool, accepted: Any) -> None:
    if not condition:
        value = getattr(config, field)
        raise ValueError(
            f"{field} = {value!r} with corpus = {config.corpus!r}; accepted: {accepted}"
        )
