"""Which position embedding a checkpoint was trained with: what it keeps, and the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from fope_jax.checkpoint import CheckpointError
from fope_jax.model.transformer import position_variables
from fope_jax.position import Fingerprint, ModelShape, PositionEmbedding, fingerprint
from fope_jax.processes import on_host

TO_CHANGE = (
    "Put back the configuration it was trained with; to go on with another position embedding or "
    "length: fope extend --from RUN --method METHOD --length TOKENS --workdir NEW"
)


def position_identity(
    position: PositionEmbedding, shape: ModelShape, constants: Any
) -> tuple[Fingerprint, dict[str, str]]:
    """The fingerprint of a model's effective position embedding, and what checkpoints keep of it.

    Args:
      position: the method.
      shape: of the model.
      constants: the model's, from ``split``, drawn or restored; they may lie over several devices.

    Returns:
      The fingerprint, and metadata: ``position``, its hash; ``position_summary``; and
      ``position_method``, the hash without the constants.
    """
    variables = position_variables({}, jax.tree.map(on_host, constants))
    found = fingerprint(position, shape, variables)
    method = fingerprint(position, shape).hash
    return found, {
        "position": found.hash,
        "position_method": method,
        "position_summary": found.summary,
    }


def check_fingerprint(
    metadata: Mapping[str, Any],
    position: PositionEmbedding,
    shape: ModelShape,
    constants: Any,
    where: str,
) -> None:
    """Raises CheckpointError where a checkpoint was trained with another position embedding.

    Args:
      metadata: of the checkpoint.
      position: of the configuration.
      shape: of the model.
      constants: restored from the checkpoint; None compares method, knobs and frequencies alone,
        before arrays are read whose shapes depend on them.
      where: the checkpoint, for people.
    """
    if constants is None:
        key, found, parts = "position_method", fingerprint(position, shape), "the configuration"
    else:
        key, parts = "position", "the configuration and the restored constants"
        found, _ = position_identity(position, shape, constants)
    if metadata.get(key, found.hash) != found.hash:
        raise CheckpointError(
            f"{where}: the checkpoint was trained with position fingerprint {metadata[key]} "
            f"({metadata.get('position_summary', 'no summary was kept')}), but {parts} give "
            f"{found.hash} ({found.summary}), another position embedding. {TO_CHANGE}"
        )
