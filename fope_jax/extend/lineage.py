"""lineage.json: the parent of an extended run and the changes made."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fope_jax.config import ConfigError, Experiment
from fope_jax.data.cache_directories import cache_identity
from fope_jax.data.cache_reader import TokenCache
from fope_jax.extend.frequencies import FrequencyChanges
from fope_jax.extend.methods import fope_form
from fope_jax.extend.parent import Parent
from fope_jax.position import Fingerprint
from fope_jax.storage.files import read_json
from fope_jax.storage.paths import as_path
from fope_jax.train.workdir import LINEAGE

log = logging.getLogger(__name__)


def data_changes(
    parent: Experiment, child: Experiment, cache: TokenCache, is_imported: bool
) -> dict[str, Any]:
    """How the child's tokens are cut into windows, and at which batch it starts."""
    old, new, total = parent.train, child.train, cache.num_tokens
    windows = [math.ceil(total / config.length) for config in (old, new)]
    tokens = new.batch_size * new.length
    cut = f"{total} tokens, in {windows[1]} windows of {new.length}"
    begins = f"begins at batch {new.data_start} of its shuffled windows"
    if not total:
        cut, begins = "no text, tasks alone", f"begins at batch {new.data_start}"
    update = f"{new.batch_size} rows an update"
    if is_imported:
        unknown = "what the imported weights saw is not known"
        text = f"{cut}; {update}, {tokens} tokens; {begins}; {unknown}"
    elif not has_same_data(parent, child):
        text = f"not the parent's: {cut}; {update}, {tokens} tokens as before; {begins}"
    elif not total:
        text = f"{cut}; {update} in place of {old.batch_size}, {tokens} tokens as before; {begins}"
    else:
        text = (
            f"the documents in their order, {cut} in place of {windows[0]} of {old.length}; "
            f"{update} in place of {old.batch_size}, {tokens} tokens as before; {begins}"
        )
        if new.length != old.length:
            text += ", another order than the parent's, so that some were seen by it and some not"
    return {
        "text": text,
        "tokens": total,
        "windows": windows,
        "lengths": [old.length, new.length],
        "rows": [old.batch_size, new.batch_size],
        "tokens_an_update": tokens,
        "first_batch": new.data_start,
    }


def describe_parent(parent: Parent, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ``parent`` of a lineage; ``metadata`` are those of its checkpoint."""
    trained = parent.experiment.train
    return {
        "run": parent.source,
        "step": parent.step,
        "name": parent.experiment.name,
        "length": trained.length,
        "tokens_seen": (trained.data_start + parent.step) * trained.batch_size * trained.length,
        "position": {"hash": metadata["position"], "summary": metadata.get("position_summary")},
    }


def lineage_of(
    request: dict[str, Any],
    parent: Parent,
    metadata: Mapping[str, Any],
    child: Experiment,
    length: int,
    position: Fingerprint,
    frequencies: FrequencyChanges | None,
    arrays: str,
    data: dict[str, Any] | None = None,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What lineage.json holds; ``metadata`` are those of the parent's checkpoint."""
    return {
        "request": request,
        "parent": describe_parent(parent, metadata),
        "child": {
            "name": child.name,
            "length": length,
            "position": {"hash": position.hash, "summary": position.summary},
        },
        "frequencies": frequencies and {"text": frequencies.text, **frequencies._asdict()},
        "arrays": arrays,
        "data": data,
        "start": start,
    }


def log_position_change(
    before: Experiment, child: Experiment, frequencies: FrequencyChanges | None, arrays: str
) -> None:
    """Log lines of what an extension changes in the position embedding and its arrays."""
    if form := fope_form(before.position, child.position):
        log.info("%s", form)
    if frequencies is not None:
        log.info("frequencies: %s", frequencies.text)
    if arrays:
        log.info("position arrays: %s", arrays)


def has_same_data(parent: Experiment, child: Experiment) -> bool:
    """Whether both read the same tokens, wherever they are and however packed."""
    return cache_identity(parent.data) == cache_identity(child.data)


def read_lineage(workdir: str | Path) -> dict[str, Any] | None:
    """The lineage.json of a run; None for a run that is not an extension."""
    path = as_path(workdir) / LINEAGE
    return read_json(path) if path.is_file() else None


def check_request(workdir: Path, lineage: dict[str, Any] | None, request: dict[str, Any]) -> None:
    """Raises ConfigError if the ``lineage`` of a workdir with checkpoints is of another request."""
    if lineage is None:
        raise ConfigError(
            f"workdir {workdir} holds a run that is no extension (it has no {LINEAGE}); use "
            "another --workdir"
        )
    stored = lineage["request"]
    for key in {**stored, **request}:  # flags are kept where they were given
        before, now = stored.get(key, False), request.get(key, False)
        if before != now:
            raise ConfigError(
                f"workdir {workdir} holds an extension with {key} = {before}, now {now}; use "
                "another --workdir"
            )
