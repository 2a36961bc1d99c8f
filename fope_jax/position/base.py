"""The interface of a position embedding, and the method that leaves everything as it is (NoPE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

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

    ``model_*`` exist once a model; ``layer_*`` have a leading layer axis ``[L, ...]``
    (``[L / period, ...]`` where methods mix over layers). ``params`` are trained; ``constants`` are
    saved, restored and sharded with the state, and no optimizer sees them. Hooks get them merged
    into one dict, so names must differ.
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
    indices, so packed documents, key caches and sharded sequences need no special case. Positions
    are ``[B, T]``, or ``[1, T]`` where all rows share them: whatever a hook makes of them then has
    a batch axis of 1 and is computed and kept once.

    Class attributes, for the table of methods:
      kind: ``none``, ``rotation``, ``bias``, ``absolute``, ``contextual`` or ``composition``.
      extends: whether the method is meant for lengths beyond training, and how, in a few words.

    Reference: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization
    in Transformers".
    """

    kind: ClassVar[str] = "none"
    extends: ClassVar[str] = "defined at any length"

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

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        """How a variable of ``init`` is cut over devices, the axis of the layers left out.

        Names are those of ``model.sharding.AXIS_RULES``: "heads" for an axis that counts query
        or key-value heads, "embed" for d_model. Axes that are not named are not cut.
        """
        return ()

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        """Changes token embeddings ``x [B, T, D]`` at ``positions [B, T]``; returns ``[B, T, D]``.

        ``variables`` are the model's (``model_params`` and ``model_constants``).
        """
        return x

    @property
    def has_embed(self) -> bool:
        """Whether ``embed`` is overridden: the method acts on token embeddings."""
        return type(self).embed is not PositionEmbedding.embed

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> Any:
        """What ``rotate`` needs and all layers share, float32, computed once a forward pass.

        ``variables`` are the model's. Returns a pytree, or None.
        """
        return None

    def rotate(self, variables: Variables, tables: Any, q: Array, k: Array) -> tuple[Array, Array]:
        """Changes ``q [B, T, N, H]`` and ``k [B, T, K, H]``; dtypes are kept.

        ``variables`` are one layer's and the model's. A method with one matrix a query head returns
        ``k`` as ``[B, T, N, H]``, each key-value head repeated for the query heads that read it.
        """
        return q, k

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array | None:
        """The additive attention bias for a block of scores.

        Args:
          variables: one layer's and the model's.
          q_positions: ``[B, T]`` or ``[1, T]``, any slice of the sequence.
          k_positions: ``[B, S]`` or ``[1, S]``, any slice of the sequence.

        Returns:
          ``[B, N, T, S]`` float32, added to the scaled logits (batch axis 1 where both positions
          have it), or None where the method has none. An axis along which it is the same may be 1:
          ``[B, 1, T, S]`` is one bias for all heads. What differs by head comes in as a variable
          that ``init`` draws with an axis of heads, named in ``variable_axes``: on a mesh a device
          has some of the heads only, and gets theirs.
        """
        return None

    @property
    def has_bias(self) -> bool:
        """Whether ``bias`` is overridden, known without evaluating it."""
        return type(self).bias is not PositionEmbedding.bias

    def head_bias(
        self, values: dict[str, Any], q_positions: Array, k_positions: Array
    ) -> Array | None:
        """``bias`` of one head, in the operations that a kernel has for a block of scores.

        Element by element and of numbers: no table is indexed, nothing is multiplied as a matrix,
        so that it can be evaluated, and differentiated, inside a kernel.

        Args:
          values: what of each variable is this head's: a number, or a tuple of numbers where it is
            a vector. They follow from ``variable_axes``.
          q_positions: int32, tokens, of a shape that spreads over the block, such as ``[1, t]``.
          k_positions: the same, such as ``[s, 1]``.

        Returns:
          float32 of the shape that both have together, such as ``[s, t]``, or None where the method
          has no bias or cannot put it like this.
        """
        return None

    @property
    def has_head_bias(self) -> bool:
        """Whether ``head_bias`` is overridden, known without evaluating it."""
        return type(self).head_bias is not PositionEmbedding.head_bias

    def contextual_bias(self, variables: Variables, q: Array, logits: Array) -> Array | None:
        """The additive bias of whole rows of scores, for methods whose positions depend on content.

        Args:
          variables: one layer's and the model's.
          q: ``[B, T, N, H]``, a slice of the queries, after ``rotate``.
          logits: ``[B, N, T, S]`` float32, scaled, with all keys in the order of their positions;
            -inf where the query does not see the key.

        Returns:
          ``[B, N, T, S]`` float32, or 1 on axes along which it is the same, finite everywhere; None
          where the method has none.
        """
        return None

    @property
    def has_contextual_bias(self) -> bool:
        """Whether ``contextual_bias`` is overridden, known without evaluating it."""
        return type(self).contextual_bias is not PositionEmbedding.contextual_bias

    @property
    def needs_causal_mask(self) -> bool:
        """Whether it is defined for keys at the query's position or before it only.

        The attention of this package is causal always; the drop-ins refuse other attention.
        """
        return False

    def period(self, num_layers: int) -> int:
        """After how many layers the methods of the layers repeat; 1 where all layers are alike."""
        return 1

    @property
    def follows_length(self) -> bool:
        """Whether all positions of a row depend on how long it is; not for a growing key cache."""
        return False

    def at_layer(self, index: int) -> PositionEmbedding:
        """The method of layer ``index`` within a period."""
        return self

    def of_layer(
        self, index: int, variables: Variables, tables: Any
    ) -> tuple[PositionEmbedding, Variables, Any]:
        """The method of layer ``index`` within a period, with its own of variables and tables.

        Args:
          index: from 0 below ``period``.
          variables: any of those of one period, layer axis removed, and of the model's.
          tables: of the whole model.
        """
        return self.at_layer(index), variables, tables


@dataclass(frozen=True)
class NoPE(PositionEmbedding):
    """No position embedding: the causal mask is the only source of order (see the base class)."""
