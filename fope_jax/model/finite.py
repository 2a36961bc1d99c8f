"""Counts of NaN and infinite values by array name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def count_non_finite(arrays: Any) -> dict[str, int]:
    """NaN and infinite values in each array of a pytree, for arrays that have any.

    JAX arrays are counted on their devices, by one program. Integers and booleans are always
    finite.

    >>> count_non_finite({"a": np.ones(2), "layers": [np.array([1.0, np.nan, np.inf])]})
    {'layers.0': 2}
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): array
        for path, array in jax.tree_util.tree_leaves_with_path(arrays)
        if jnp.issubdtype(array.dtype, jnp.inexact)
    }
    on_devices = {name: array for name, array in leaves.items() if isinstance(array, jax.Array)}
    counts = {name: _count(np, x) for name, x in leaves.items() if name not in on_devices}
    if on_devices:
        counts |= jax.device_get(_count_all(on_devices))
    return {name: int(counts[name]) for name in leaves if counts[name]}


def _count(numpy: Any, array: Any) -> Any:
    # NumPy has no isfinite for some ml_dtypes types; none of them is wider than float32.
    wide = array if array.dtype.itemsize >= 4 else array.astype(numpy.float32)
    return (~numpy.isfinite(wide)).sum()


@jax.jit
def _count_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _count(jnp, array) for name, array in arrays.items()}


def describe_non_finite(counts: dict[str, int], shown: int = 5) -> str:
    """Formats the result of `count_non_finite` for a message, the first ``shown`` names.

    >>> describe_non_finite({"a": 3, "b": 1, "c": 2}, shown=2)
    'a (3 values), b (1 value) and 1 more'
    """
    words = [f"{name} ({n} value{'s' * (n != 1)})" for name, n in list(counts.items())[:shown]]
    rest = len(counts) - len(words)
    return ", ".join(words) + (f" and {rest} more" if rest > 0 else "")
