"""Whether the tensors of a file are those of the model that the file describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from fope_jax.model.config import TransformerConfig
from fope_jax.model.finite import describe_non_finite
from fope_jax.model.transformer import Transformer, split
from fope_jax.position import PositionEmbedding

_MOST_LISTED = 6  # tensors in an error


def empty_params(config: TransformerConfig, position: PositionEmbedding) -> dict[str, Any]:
    """The parameters of a model as NumPy arrays that are not filled yet."""
    shapes = nnx.eval_shape(lambda: Transformer(config, position, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), split(shapes)[1])


def check_tensors(
    where: str,
    described_by: str,
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
    other_problems: Mapping[str, list[str]] | None = None,
) -> None:
    """Raises ValueError with names and shapes unless the tensors are those of the model.

    Args:
      where, described_by: the file or directory, and what of it describes the model.
      stored, expected: shapes by name; names of ``optional`` may be stored too.
      other_problems: tensors by what else is wrong with them.
    """
    problems = {
        "missing": [f"{name} {list(expected[name])}" for name in expected if name not in stored],
        "unexpected": [
            f"{name} {list(shape)}"
            for name, shape in stored.items()
            if name not in expected and name not in optional
        ],
        "of another shape": [
            f"{name} {list(stored[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if stored.get(name, shape) != shape
        ],
        **(other_problems or {}),
    }
    lines = [
        f"\n  {len(names)} {problem}: "
        + "; ".join(names[:_MOST_LISTED] + ["..."] * (len(names) > _MOST_LISTED))
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{where}: tensors are not those of the model that {described_by} describes"
            + "".join(lines)
        )


def check_finite(where: str, non_finite: dict[str, int]) -> None:
    """Raises ValueError if ``non_finite``, from ``count_non_finite``, names any tensor."""
    if non_finite:
        raise ValueError(
            f"{where}: NaN or infinite: {describe_non_finite(non_finite)}; a model with such "
            "values computes nothing that means anything"
        )
