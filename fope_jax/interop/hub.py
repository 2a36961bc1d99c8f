"""Checkpoints of the Hugging Face Hub, through the cache that transformers uses too."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fope_jax.extras import require
from fope_jax.interop.tokenizer_files import TOKENIZER_FILES
from fope_jax.storage.paths import expand_home

log = logging.getLogger(__name__)

PREFIX = "hf:"
# What an import reads, and what it refuses because another program would read it.
_ALLOWED = ["config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
_ALLOWED += TOKENIZER_FILES
_IGNORED = ["*/*", "consolidated*"]
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[^@\s]{1,200})?", re.ASCII)


class Origin(NamedTuple):
    """The repository and commit of a checkpoint in the cache of huggingface_hub."""

    repository: str
    commit: str

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]


def origin_of(directory: Path) -> Origin | None:
    """Where a directory of the cache comes from; None for any other directory.

    >>> origin_of(Path("hub/models--allenai--OLMo-2/snapshots/0a1b"))
    Origin(repository='allenai/OLMo-2', commit='0a1b')
    """
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    return Origin(folder.removeprefix("models--").replace("--", "/"), directory.name)


def local_checkpoint(source: str | Path, progress: bool = True) -> Path:
    """The directory of a Hugging Face checkpoint, downloaded if it is named by ``hf:ORG/NAME``.

    Files go through the cache of huggingface_hub, $HF_HOME; with HF_HUB_OFFLINE=1, or where the Hub
    cannot be reached, what lies there is taken.

    Args:
      source: a directory; ``hf:DIR``; or ``hf:ORG/NAME`` with an optional ``@REVISION``, a branch,
        tag or commit. A directory that exists wins.
      progress: whether downloads show a bar.

    Raises:
      FileNotFoundError: no such directory, repository or revision, or none that is accessible.
      OSError: the Hub cannot be reached and the cache does not have the checkpoint.
      ImportError: without huggingface_hub.
    """
    text = str(source)
    name = expand_home(text.removeprefix(PREFIX))
    if not text.startswith(PREFIX) or not _NAME.fullmatch(name) or Path(name).exists():
        return Path(name)  # what reads it says what is wrong with it
    repository, _, revision = name.partition("@")
    return _snapshot(repository, revision or None, progress)


def _snapshot(repository: str, revision: str | None, progress: bool) -> Path:
    """The directory in the cache, after downloading what it lacks."""
    hub: Any = require("huggingface_hub", "train")
    utils = require("huggingface_hub.utils", "train")
    named = f"{PREFIX}{repository}" + (f"@{revision}" if revision else "")
    with _hub_errors(named), _progress_bars(utils, progress):
        directory = Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_ALLOWED,
                ignore_patterns=_IGNORED,
                library_name="fope-jax",
            )
        )
    log.info("%s: commit %s in %s", named, directory.name, directory)
    return directory


@contextlib.contextmanager
def _progress_bars(utils: Any, shown: bool) -> Iterator[None]:
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@contextlib.contextmanager
def _hub_errors(named: str) -> Iterator[None]:
    """One line with what to do, for whatever huggingface_hub and its HTTP library raise."""
    errors: Any = require("huggingface_hub.errors", "train")
    constants: Any = require("huggingface_hub.constants", "train")
    repository, _, revision = named.removeprefix(PREFIX).partition("@")
    what = f"{named}: there is no directory {named.removeprefix(PREFIX)}, and"
    elsewhere = (
        f"`hf download {repository}` where there is a network fills the cache, $HF_HOME; a copy of "
        f"it, or `hf download {repository} --local-dir DIR` and DIR, does as well"
    )
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{what} no model can have this name: {_first_line(error)}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{named}: {repository} has no revision {revision!r}; accepted: a branch, tag or "
            f"commit of https://huggingface.co/{repository}/commits/main"
        ) from error
    except errors.RepositoryNotFoundError as error:  # a gated one is of this kind
        raise FileNotFoundError(
            f"{what} the Hub shows no model {repository}: look at "
            f"https://huggingface.co/{repository}; a gated or private one needs its terms "
            "accepted there and `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "the Hub is out of reach"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE=1 forbids downloads"
        raise FileNotFoundError(
            f"{what} the cache {constants.HF_HUB_CACHE} lacks files of it; {why}. {elsewhere}"
        ) from error
    except Exception as error:  # of the HTTP library, which depends on the version
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise OSError(f"{what} the Hub cannot be read ({reason}). {elsewhere}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
