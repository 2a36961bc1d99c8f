"""What an unfinished build has done, kept in its directory so that the build can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from fope_jax.data.cache_writer import Progress, writing_errors
from fope_jax.data.config import SPLITS
from fope_jax.logs import report_progress
from fope_jax.storage.files import read_json, write_json

log = logging.getLogger(__name__)


def _no_progress() -> dict[str, Progress]:
    return {split: Progress() for split in SPLITS}


@dataclasses.dataclass
class BuildState:
    """The state of a build, in ``progress.json`` of its directory.

    Attributes:
      directory: of the unfinished cache.
      content: digest of the text, see `fope_jax.data.sources.cut_digest`.
      tokenizer: its description, None before there is one.
      splits: what is written of each.
    """

    directory: Path
    content: str
    tokenizer: dict[str, Any] | None = None
    splits: dict[str, Progress] = dataclasses.field(default_factory=_no_progress)

    @property
    def path(self) -> Path:
        return self.directory / "progress.json"

    def save(self) -> None:
        """Writes the file; WriteError if the disk is full."""
        fields = dataclasses.asdict(self)
        del fields["directory"]
        with writing_errors(self.path):
            write_json(self.path, fields)


def resume(directory: Path, content: str) -> BuildState:
    """The state of an interrupted build of the same text; any other build there is deleted."""
    directory.mkdir(parents=True, exist_ok=True)
    # A state that cannot be parsed was not written by a build: start again.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        stored = read_json(directory / "progress.json")
        splits = {name: Progress(**fields) for name, fields in stored["splits"].items()}
        state = BuildState(directory, stored["content"], stored["tokenizer"], splits)
        shards = [shard for progress in splits.values() for shard in progress.shards]
        is_current = all("index" in shard for shard in shards)  # older versions wrote none
        if state.content == content and is_current:
            done = sum(progress.num_tokens for progress in splits.values())
            report_progress(f"going on with {directory} after {done:,} tokens", log)
            return state
    shutil.rmtree(directory)
    directory.mkdir()
    return BuildState(directory, content)
