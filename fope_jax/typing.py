"""The letter key of the repository and the one batch type that every folder shares.

Shapes are written with these letters everywhere:

    B batch             T query length      S key length       D model width
    N query heads       K key-value heads   H head dim         F frequencies
    V vocabulary        L layers
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # jax.Array or numpy.ndarray: every public function takes either


class Batch(NamedTuple):
    """One batch of training or evaluation windows, all leaves ``[B, T]``.

    Where all rows have the same positions, a model also takes them as ``[1, T]``.

    Attributes:
      tokens: int32, the input tokens.
      targets: int32, the token that follows each input token.
      positions: int32, tokens since the start of the segment.
      segments: int32, which part of its row a token belongs to, counted from 1; 0 is padding. A
        part is a document, or what the window holds of one; or the whole window, where the data
        config joins documents. Tokens attend within their own segment only.
      weights: float32, 1 where the target is scored, 0 where it is not.
    """

    tokens: Array
    targets: Array
    positions: Array
    segments: Array
    weights: Array
