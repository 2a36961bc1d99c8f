"""The interface of a position embedding, and the method that leaves everything as it is (NoPE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from fope_jax.typing import Array

Variables = dict[str, Array]


class ModelShape(NamedTuple):
    """What a position embedding may know of the model it serves (see the letter key).

    Attributes:
      d_model: model width D.
      num_layers: layers L.
      num_heads: query heads N.
      num_kv_heads: key-value heads K, a divisor of N.
      head_dim: head dim H.
    """

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PositionVariables:
    """Arrays that a position embedding owns, sorted by who may change them and where they live.

    A pytree of four dicts.

    ``model_*`` exist once a model; ``layer_*`` have a leading layer axis ``[L, ...]``. ``params``
    are trained; ``constants`` are saved, restored and sharded with the state, and no optimizer
    sees them. Hooks get the two merged into one dict, so names must differ.
    """

    model_params: Variables = field(default_factory=dict)
    model_constants: Variables = field(default_factory=dict)
    layer_params: Variables = field(default_factory=dict)
    layer_constants: Variables = field(default_factory=dict)


@dataclass(frozen=True)
class PositionEmbedding:
    """No position embedding (NoPE), and the base class: every hook is the identity.

    A method is a frozen dataclass of its knobs that overrides only the hooks it changes. All hooks
    are pure functions of int32 positions (tokens since the start of the segment), never of array
    indices, so packed documents, key caches and sharded sequences need no special case.

    Reference: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization
    in Transformers".
    """

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError, naming knob and value, where the method cannot serve ``shape``."""

    def max_length(self) -> int | None:
        """The longest sequence in tokens that the method is defined for; None means any."""
        return None

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        """The method's frequencies in radians per token; None where it has none."""
        return None

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        """Draws trainable parameters and fixed constants; deterministic in ``key``."""
        return PositionVariables()

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        """Changes token embeddings ``x [B, T, D]`` at ``positions [B, T]``; returns ``[B, T, D]``.

        ``variables`` are the model's (``model_params`` and ``model_constants``).
        """
        return x

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> Any:
        """What ``rotate`` needs and all layers share, float32, computed once a forward pass.

        ``variables`` are the model's. Returns a pytree, or None.
        """
        return None

    def rotate(self, variables: Variables, tables: Any, q: Array, k: Array) -> tuple[Array, Array]:
        """Changes ``q [B, T, N, H]`` and ``k [B, T, K, H]``; dtypes are kept.

        ``variables`` are one layer's. A method with one matrix a query head returns ``k`` as
        ``[B, T, N, H]``, each key-value head repeated for the query heads that read it.
        """
        return q, k

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array | None:
        """The additive attention bias for a block of scores.

        Args:
          variables: one layer's.
          q_positions: ``[B, T]``, any slice of the sequence.
          k_positions: ``[B, S]``, any slice of the sequence.

        Returns:
          ``[B, N, T, S]`` float32, added to the scaled logits, or None where the method has none.
        """
        return None

    @property
    def has_bias(self) -> bool:
        """Whether ``bias`` is overridden, known without evaluating it."""
        return type(self).bias is not PositionEmbedding.bias


@dataclass(frozen=True)
class NoPE(PositionEmbedding):
    """No position embedding: the causal mask is the only source of order (see the base class)."""
