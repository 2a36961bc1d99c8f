"""The position fingerprint of a checkpoint: its metadata, and the check at restore."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from fope_jax.model.transformer import position_variables
from fope_jax.position import Fingerprint, ModelShape, PositionEmbedding, fingerprint
from fope_jax.processes.collectives import gather_to_host
from fope_jax.storage.checkpoint import CheckpointError

log = logging.getLogger(__name__)

TO_CHANGE = (
    "Put back the configuration it was trained with; to go on with another position embedding or "
    "length: fope extend RUN --method METHOD --length TOKENS --workdir NEW. To take the "
    "weights with this one all the same: --accept-position"
)


def checkpoint_fingerprint(
    position: PositionEmbedding, shape: ModelShape, constants: Any
) -> tuple[Fingerprint, dict[str, str]]:
    """The fingerprint of a model's position embedding, and the metadata that a checkpoint keeps.

    ``position_method`` is the hash without ``constants``, which ``split`` gives and may be sharded.
    """
    variables = position_variables({}, jax.tree.map(gather_to_host, constants))
    effective = fingerprint(position, shape, variables)
    return effective, {
        "position": effective.hash,
        "position_method": fingerprint(position, shape).hash,
        "position_summary": effective.summary,
    }


def check_fingerprint(
    metadata: Mapping[str, Any],
    position: PositionEmbedding,
    shape: ModelShape,
    constants: Any,
    where: str,
    accept: str | None = None,
) -> None:
    """Raises CheckpointError where a checkpoint was trained with another position embedding.

    Args:
      metadata: of the checkpoint; ``where`` is its name.
      position, shape: of the configuration.
      constants: restored from the checkpoint. None compares method, knobs and frequencies only,
        before arrays are read whose shapes depend on them.
      accept: hash, with or without constants, that gives a warning in place of the error.
    """
    if constants is None:
        key, expected = "position_method", fingerprint(position, shape)
    else:
        key, expected = "position", checkpoint_fingerprint(position, shape, constants)[0]
    if metadata.get(key, expected.hash) == expected.hash:
        return
    if accept is not None and accept in (expected.hash, fingerprint(position, shape).hash):
        log.warning(
            "%s: position fingerprint %s, accepted as %s", where, metadata[key], expected.hash
        )
        return
    source = "the configuration" + ("" if constants is None else " and the restored constants")
    raise CheckpointError(
        f"{where}: the checkpoint was trained with position fingerprint {metadata[key]} "
        f"({metadata.get('position_summary', 'no summary was kept')}), but {source} give "
        f"{expected.hash} ({expected.summary}), another position embedding. {TO_CHANGE} "
        f"{expected.hash}"
    )
