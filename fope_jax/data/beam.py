"""Tokenizes on many machines: the parts of a build as an Apache Beam pipeline."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.data.config import DataConfig
from fope_jax.data.corpora import CorpusError
from fope_jax.data.documents import TokenizedDocuments
from fope_jax.data.parts import Part, part_name, read_saved_part, save_part
from fope_jax.data.tokenized import InProcess
from fope_jax.data.tokenizers import Tokenizer, describe_tokenizer, load_tokenizer
from fope_jax.extras import require
from fope_jax.logs import report_progress
from fope_jax.storage.paths import as_path

log = logging.getLogger(__name__)

_FORMAT = 4  # of the part files


class Runner(NamedTuple):
    """A Beam runner and the directory for the parts.

    Attributes:
      name: in Beam: "DirectRunner" (this machine), "DataflowRunner", "FlinkRunner", ...
      options: "KEY=VALUE", or "KEY" for a switch, without dashes.
      parts: writable by all workers, as ``gs://bucket/parts``; "" for one beside the cache.
    """

    name: str = "DirectRunner"
    options: tuple[str, ...] = ()
    parts: str = ""


def check_runner(config: DataConfig) -> None:
    """Raises CorpusError for a corpus that is not read through Beam, ImportError without Beam."""
    if any(corpus == "c4" for corpus, _ in config.components) and config.tfds_data_dir:
        raise CorpusError(
            f"tfds_data_dir = {config.tfds_data_dir!r} is not read through Beam, as the order"
            " of its documents is TFDS's own; give the public c4-train.*.json.gz as train_files"
        )
    require("apache_beam", "beam")


class BeamWorkers(InProcess):
    """Tokenizes with ``runner``.

    Args:
      content: a digest of the text; parts of another text are not reused.
      directory: for the parts, if the runner names none.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, runner: Runner, content: str, directory: str
    ):
        super().__init__(config, tokenizer)
        self._runner = runner
        # The digest lets caches share a directory.
        books = [sorted(config.validation_books), sorted(config.excluded_books)]
        identity = json.dumps([content, tokenizer.fingerprint, books, _FORMAT]).encode()
        place = (runner.parts or directory).rstrip("/")
        self._directory = f"{place}/{hashlib.sha256(identity).hexdigest()[:16]}"

    def read_parts(
        self, parts: Sequence[Part]
    ) -> Iterator[Callable[[int], Iterator[TokenizedDocuments]]]:
        outputs = [f"{self._directory}/{part_name(part)}" for part in parts]
        run(list(zip(parts, outputs, strict=True)), self.config, self.tokenizer, self._runner)
        for part, output in zip(parts, outputs, strict=True):
            yield functools.partial(read_saved_part, part, output)


def run(
    work: Sequence[tuple[Part, str]], config: DataConfig, tokenizer: Tokenizer, runner: Runner
) -> None:
    """Tokenizes each part of ``work`` into its output, unless that exists."""
    beam: Any = require("apache_beam", "beam")
    options: Any = require("apache_beam.options.pipeline_options", "beam")
    missing = [(part, output) for part, output in work if not as_path(output + ".npz").exists()]
    line = f"beam: {len(missing)} of {len(work)} parts to tokenize with {runner.name}"
    report_progress(line, log)
    if not missing:
        return
    flags = [f"--runner={runner.name}", *(f"--{o.lstrip('-')}" for o in runner.options)]
    with beam.Pipeline(options=options.PipelineOptions(flags)) as pipeline:
        # Without Reshuffle a runner may fuse Create and MapTuple and run all parts on one worker.
        tokenize = functools.partial(save_part, config, _carry(tokenizer))
        _ = pipeline | beam.Create(missing) | beam.Reshuffle() | beam.MapTuple(tokenize)


def _carry(tokenizer: Tokenizer) -> Callable[[], Tokenizer]:
    """A function that makes the tokenizer again on another machine, from its file."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        files = sorted((path.name, path.read_bytes()) for path in Path(scratch).iterdir())
    return functools.partial(_load, json.dumps(describe_tokenizer(tokenizer)), tuple(files))


@functools.cache
def _load(description: str, files: tuple[tuple[str, bytes], ...]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in files:
            (Path(scratch) / name).write_bytes(content)
        return load_tokenizer(Path(scratch), json.loads(description))
