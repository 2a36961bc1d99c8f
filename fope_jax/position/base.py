"""The interface of a position embedding, and the method that leaves everything as it is (NoPE)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.rotation import as_array
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

    ``model_*`` exist once a model; ``layer_*`` have a leading layer axis ``[L, ...]`` (``[L / P,
    ...]`` where ``layers`` gives P of them). ``params`` are trained; ``constants`` are saved,
    restored and sharded with the state, and no optimizer sees them. Hooks get them merged into one
    dict, so names must differ.
    """

    model_params: Variables = field(default_factory=dict)
    model_constants: Variables = field(default_factory=dict)
    layer_params: Variables = field(default_factory=dict)
    layer_constants: Variables = field(default_factory=dict)

    def at_layer(self, index: int) -> Variables:
        """The variables of one layer (of one period) and of the model, as the hooks get them."""
        layers = {**self.layer_params, **self.layer_constants}
        layer = {name: value[index] for name, value in layers.items()}
        return {**self.model_params, **self.model_constants, **layer}


class Limits(NamedTuple):
    """Where a method is defined.

    Attributes:
      max_length: the longest sequence in tokens; None means any.
      needs_causal_mask: only for keys at the query's position or before it. The attention of this
        package is causal always; the drop-ins refuse other attention.
      follows_length: all positions of a row depend on how long it is, as with dynamic NTK: keys
        that were rotated and cached are wrong once the sequence has grown.
    """

    max_length: int | None = None
    needs_causal_mask: bool = False
    follows_length: bool = False


GROUPS = tuple(field.name for field in fields(PositionVariables))


@dataclass(frozen=True)
class PositionEmbedding:
    """No position embedding (NoPE), and the base class: every hook is the identity.

    A method is a frozen dataclass of its knobs that overrides only the hooks it changes. All hooks
    are pure functions of int32 positions (tokens since the start of the segment), never of array
    indices, so packed documents, key caches and sharded sequences need no special case. Positions
    are ``[B, T]``, or ``[1, T]`` where all rows share them: whatever a hook makes of them then has
    a batch axis of 1 and is computed and kept once. ``variables`` are what ``init`` drew, the
    model's and one layer's in one dict, without the axis of the layers.

    Class attributes, for the table of methods:
      kind: ``none``, ``rotation``, ``bias``, ``absolute``, ``contextual`` or ``composition``.
      extends: whether the method is meant for lengths beyond training, and how, in a few words.
    """

    kind: ClassVar[str] = "none"
    extends: ClassVar[str] = "defined at any length"

    @property
    def limits(self) -> Limits:
        """Where the method is defined."""
        return Limits()

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError, naming knob and value, where the method cannot serve ``shape``."""

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        """The method's frequencies in radians per token; None where it has none."""
        return None

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        """Draws trainable parameters and fixed constants; deterministic in ``key``."""
        return PositionVariables()

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        """What the axes of a variable of ``init`` count, the axis of the layers left out.

        Names are those of ``fope_jax.model.sharding.AXIS_RULES``: "heads" for query or key-value
        heads, "embed" for d_model. Axes that are not named are not cut over devices.
        """
        return ()

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        """Changes token embeddings ``x [B, T, D]`` at ``positions [B, T]``; returns ``[B, T, D]``.

        ``variables`` are the model's alone.
        """
        return x

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> Any:
        """What ``rotate`` needs and all layers share, float32, computed once a forward pass.

        ``variables`` are the model's alone. Returns a pytree, or None.
        """
        return None

    def rotate(self, variables: Variables, tables: Any, q: Array, k: Array) -> tuple[Array, Array]:
        """Changes ``q [B, T, N, H]`` and ``k [B, T, K, H]``; dtypes are kept.

        A method with one matrix a query head returns ``k`` as ``[B, T, N, H]``, each key-value head
        repeated for the query heads that read it.
        """
        return q, k

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        """The bias that one head adds to its scaled logits, for any block of them.

        It is written for one head and element by element: ``bias_of_heads`` evaluates it for all
        heads at once, and the attention kernel for TPU inside a block of scores.

        Args:
          variables: float32; of those with an axis of query heads (``variable_axes``) this head's.
            In the kernel a variable is a number, or a tuple of numbers where it is a vector
            (``is_in_kernel``): no table can be indexed there, nothing multiplied as a matrix.
          q_positions: int32, tokens, of a shape that broadcasts with the keys' over the block, such
            as ``[B, t, 1]``.
          k_positions: the same, such as ``[B, 1, s]``.

        Returns:
          float32 that broadcasts to the shape of the block.
        """
        return jnp.zeros((), jnp.float32)

    def contextual_bias(self, variables: Variables, q: Array, logits: Array) -> Array:
        """The bias of whole rows of scores, for methods whose positions depend on content.

        Args:
          variables: one layer's and the model's.
          q: ``[B, T, N, H]``, a slice of the queries, after ``rotate``.
          logits: ``[B, N, T, S]`` float32, scaled, with all keys in the order of their positions;
            -inf where the query does not see the key.

        Returns:
          ``[B, N, T, S]`` float32, or 1 on axes along which it is the same, finite everywhere.
        """
        return jnp.zeros((1, 1, 1, 1), jnp.float32)

    def layers(self) -> tuple[Layer, ...]:
        """The methods of the layers, one period of them; layer l uses entry ``l mod P``.

        The hooks of these methods are called, with the variables that ``Layer.select`` gives.
        """
        return (Layer(self),)


class Layer(NamedTuple):
    """What a layer of a model does with positions.

    Attributes:
      method: its hooks act in this layer.
      scope: what the names of its variables begin with.
      logit_scale: from positions of queries ``[B, T]`` to the factor on their logits before any
        bias, ``[1 or B, 1 or T]`` float32; None means 1.
    """

    method: PositionEmbedding
    scope: str = ""
    logit_scale: Callable[[Array], Array] | None = None

    def select(self, variables: Variables) -> Variables:
        """The layer's own variables, under the names that its method has for them."""
        return select(variables, self.scope)


def select(variables: Variables, scope: str) -> Variables:
    """The variables whose names begin with ``scope``, without it.

    >>> select({"0.slopes": 1, "1.slopes": 2}, "1.")
    {'slopes': 2}
    """
    return {
        name.removeprefix(scope): value
        for name, value in variables.items()
        if name.startswith(scope)
    }


def has_hook(method: PositionEmbedding, hook: str) -> bool:
    """Whether the method has a hook of its own, such as "bias", known without calling it."""
    return getattr(type(method), hook) is not getattr(PositionEmbedding, hook)


def embed_tokens(
    position: PositionEmbedding, variables: Variables, x: Array, positions: Array
) -> Array:
    """``embed`` of a whole model's method, which all of its layers share or none has."""
    layer = position.layers()[0]
    return layer.method.embed(layer.select(variables), x, positions)


def bias_of_heads(
    method: PositionEmbedding, variables: Variables, q_positions: Array, k_positions: Array
) -> Array:
    """``PositionEmbedding.bias`` of all heads, for a block of scores.

    What does not depend on the head is computed once.

    Args:
      method: of one layer, with a bias.
      variables: one layer's and the model's, with their axes of heads.
      q_positions: integers ``[B, T]`` or ``[1, T]``, any slice of the sequence.
      k_positions: integers ``[B, S]`` or ``[1, S]``, any slice of the sequence.

    Returns:
      ``[B, N, T, S]`` float32, batch axis 1 where both positions have it; ``[B, 1, T, S]`` where
      no variable differs by head.
    """
    q_positions, k_positions = block_positions(q_positions, k_positions)
    variables = {name: _as_float32(value) for name, value in variables.items()}
    heads = {
        name: axes.index("heads") if "heads" in (axes := method.variable_axes(name)) else None
        for name in variables
    }
    block = jnp.broadcast_shapes(q_positions.shape, k_positions.shape)

    def of_one_head(variables: Variables) -> Array:
        return jnp.broadcast_to(method.bias(variables, q_positions, k_positions), block)

    if all(axis is None for axis in heads.values()):
        return of_one_head(variables)[:, None]
    return jax.vmap(of_one_head, in_axes=(heads,), out_axes=1)(variables)


def _as_float32(value: Array) -> Array:
    value = as_array(value)
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def block_positions(q_positions: Array, k_positions: Array) -> tuple[Array, Array]:
    """``[B, T, 1]`` and ``[B, 1, S]``, which broadcast over a block of scores.

    Raises:
      ValueError: they are not ``[B or 1, T]`` and ``[B or 1, S]``.
    """
    q_positions, k_positions = as_array(q_positions), as_array(k_positions)
    shapes = q_positions.shape, k_positions.shape
    fits = all(len(shape) == 2 for shape in shapes)
    if not fits or len({shape[0] for shape in shapes} - {1}) > 1:
        raise ValueError(
            f"q_positions {shapes[0]}, k_positions {shapes[1]}: expected [B, T] and [B, S], with "
            "the same B or 1"
        )
    return q_positions[:, :, None], k_positions[:, None, :]


def is_in_kernel(variable: Any) -> bool:
    """Whether a vector comes as the numbers it is made of, see ``PositionEmbedding.bias``."""
    return isinstance(variable, tuple)


@dataclass(frozen=True)
class NoPE(PositionEmbedding):
    """No position embedding: the causal mask is the only source of order (see the base class).

    Reference: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization
    in Transformers".
    """
