"""The interface of position embeddings, and NoPE, which changes nothing."""

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
    """Model sizes: width D, L layers, N query heads, K key-value heads (dividing N), head dim H."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PositionVariables:
    """The arrays of a position embedding: a pytree of four dicts.

    ``model_*`` exist once a model; ``layer_*`` have a leading layer axis ``[L, ...]`` (``[L / P,
    ...]`` where ``layers`` gives P of them). ``params`` are trained; ``constants`` are saved,
    restored and sharded with the state, and no optimizer sees them. Hooks get all in one dict, so
    names must differ.
    """

    model_params: Variables = field(default_factory=dict)
    model_constants: Variables = field(default_factory=dict)
    layer_params: Variables = field(default_factory=dict)
    layer_constants: Variables = field(default_factory=dict)

    def at_layer(self, index: int) -> Variables:
        """One layer's variables (of a period) merged with the model's, as hooks get them."""
        layers = {**self.layer_params, **self.layer_constants}
        layer = {name: value[index] for name, value in layers.items()}
        return {**self.model_params, **self.model_constants, **layer}


class Limits(NamedTuple):
    """Where a method is defined.

    Attributes:
      max_length: the longest sequence, tokens; None means any.
      needs_causal_mask: not for keys after the query; the drop-ins refuse non-causal attention.
      follows_length: the length of a row changes all its rotations (dynamic NTK), so keys cached
        after rotation are wrong once it grows.
    """

    max_length: int | None = None
    needs_causal_mask: bool = False
    follows_length: bool = False


GROUPS = tuple(field.name for field in fields(PositionVariables))


@dataclass(frozen=True)
class PositionEmbedding:
    """No position embedding (NoPE), and the base class: every hook is the identity.

    A method is a frozen dataclass of its knobs and overrides only the hooks it changes. Hooks are
    pure functions of int32 positions (tokens since the start of the segment), never of array
    indices, so packed documents, key caches and sharded sequences need no special case. Where
    training draws fractions of a token, positions are float32. They are ``[B, T]``, or ``[1, T]``
    if all rows share them; results then keep batch axis 1 and are computed once. ``variables``
    holds the model's and one layer's arrays from ``init``, without the layer axis; ``embed`` and
    ``tables`` get the model's only.

    Class attributes, for the table of methods:
      kind: ``none``, ``rotation``, ``bias``, ``absolute``, ``contextual`` or ``composition``.
      extends: whether and how the method works beyond the training length, in a few words.
    """

    kind: ClassVar[str] = "none"
    extends: ClassVar[str] = "defined at any length"

    @property
    def limits(self) -> Limits:
        return Limits()

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError, naming knob and value, if the method cannot serve ``shape``."""

    def frequencies(self, head_dim: int) -> np.ndarray | None:
        """The frequencies in radians per token; None if the method has none."""
        return None

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        """Draws parameters and constants; deterministic in ``key``."""
        return PositionVariables()

    def variable_axes(self, name: str) -> tuple[str | None, ...]:
        """Names a variable's axes, without the layer axis, for ``model.sharding.AXIS_RULES``.

        "heads" is query or key-value heads, "embed" is d_model. Unnamed axes are not sharded.
        """
        return ()

    def embed(self, variables: Variables, x: Array, positions: Array) -> Array:
        """Changes token embeddings ``x [B, T, D]`` and returns them."""
        return x

    def tables(self, variables: Variables, positions: Array, head_dim: int) -> Any:
        """What ``rotate`` needs in every layer, once per forward pass: float32 pytree or None."""
        return None

    def rotate(self, variables: Variables, tables: Any, q: Array, k: Array) -> tuple[Array, Array]:
        """Changes ``q [B, T, N, H]`` and ``k [B, T, K, H]``, keeping dtypes.

        With one matrix per query head, ``k`` comes back as ``[B, T, N, H]``. A method may widen
        both to ``[.., E]`` (PoPE: E = 2 H); the logits stay ``q.k / sqrt(H)``.
        """
        return q, k

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        """The bias that one head adds to its scaled logits, elementwise.

        ``bias_of_heads`` evaluates it for all heads, the TPU attention kernel inside a block of
        scores.

        Args:
          variables: float32, this head's entry of those with a query-head axis (``variable_axes``).
            The kernel passes numbers, and tuples of numbers for vectors (``is_in_kernel``); it has
            no indexing and no matrix product.
          q_positions, k_positions: int32 tokens that broadcast to the block, as ``[B, t, 1]``,
            ``[B, 1, s]``.

        Returns float32 that broadcasts to the block.
        """
        return jnp.zeros((), jnp.float32)

    def contextual_bias(self, variables: Variables, q: Array, logits: Array) -> Array:
        """The bias of whole rows of scores, for positions that depend on content.

        ``q [B, T, N, H]`` is a slice of the queries after ``rotate``; ``logits [B, N, T, S]``
        float32 are scaled, in order of the keys' positions, -inf where masked. Returns
        ``[B, N, T, S]`` float32, finite everywhere; axes where it is constant may be 1.
        """
        return jnp.zeros((1, 1, 1, 1), jnp.float32)

    def running_bias(self, variables: Variables, x: Array) -> Array:
        """The increments of a bias that is a running sum over the tokens between key and query.

            bias[i, j] = a[j + 1] + a[j + 2] + .. + a[i]

        ``x [B, T, D]`` is what queries and keys are projected from, ``variables`` have their head
        axes. Returns a, ``[B, T, N]`` float32. The model sums along each row, in blocks; tokens of
        a document must be stored in order of their positions.
        """
        return jnp.zeros((1, 1, 1), jnp.float32)

    def layers(self) -> tuple[Layer, ...]:
        """The methods, with hooks, of one period of layers; layer l uses entry ``l mod P``."""
        return (Layer(self),)


class Layer(NamedTuple):
    """What one layer does with positions.

    Attributes:
      method: its hooks act in this layer.
      scope: prefix of its variables' names.
      logit_scale: query positions ``[B, T]`` to a float32 factor ``[1 or B, 1 or T]`` on the logits
        before any bias; None means 1.
      window: w tokens: a query at i sees keys at j with i - w < j <= i; None means all before it.
      chunk: c tokens: a query at i sees keys of its own chunk, j // c = i // c; None means all.
      far_from: tokens: ``rotate`` returns two versions of q and k side by side, ``[.., 2 E]``. Keys
        this far back or further get their logits from the second; None means there is one.
    """

    method: PositionEmbedding
    scope: str = ""
    logit_scale: Callable[[Array], Array] | None = None
    window: int | None = None
    chunk: int | None = None
    far_from: int | None = None

    @property
    def hides_keys(self) -> bool:
        """Whether a query does not see every key at its position or before it."""
        return self.window is not None or self.chunk is not None

    def select(self, variables: Variables) -> Variables:
        """This layer's variables, without the prefix."""
        return select(variables, self.scope)


def select(variables: Variables, scope: str) -> Variables:
    """The variables whose names begin with ``scope``, without that prefix.

    >>> select({"0.slopes": 1, "1.slopes": 2}, "1.")
    {'slopes': 2}
    """
    return {
        name.removeprefix(scope): value
        for name, value in variables.items()
        if name.startswith(scope)
    }


def with_scope(drawn: PositionVariables, scope: str) -> PositionVariables:
    """``drawn`` with the prefix ``scope`` on all names; ``select`` takes it off again.

    >>> with_scope(PositionVariables(layer_params={"slopes": np.ones(2)}), "0.").layer_params
    {'0.slopes': array([1., 1.])}
    """
    return PositionVariables(
        **{
            group: {f"{scope}{name}": value for name, value in getattr(drawn, group).items()}
            for group in GROUPS
        }
    )


def has_hook(method: PositionEmbedding, hook: str) -> bool:
    """Whether the method overrides a hook, such as "bias"."""
    return getattr(type(method), hook) is not getattr(PositionEmbedding, hook)


def embed_tokens(
    position: PositionEmbedding, variables: Variables, x: Array, positions: Array
) -> Array:
    """Calls ``embed`` once for the model; all layers share it."""
    layer = position.layers()[0]
    return layer.method.embed(layer.select(variables), x, positions)


def bias_of_heads(
    method: PositionEmbedding, variables: Variables, q_positions: Array, k_positions: Array
) -> Array:
    """``PositionEmbedding.bias`` of all heads for a block of scores.

    Takes one layer's method and variables, with their head axes, and integer positions
    ``[B or 1, T]`` and ``[B or 1, S]``, any slices of the sequence. Returns ``[B, N, T, S]``
    float32; B is 1 if both positions have it, N is 1 if no variable has heads. Raises ValueError
    for other shapes and for a bias that is not that of one head, KeyError for a missing variable.
    """
    return bias_at(method, variables, *block_positions(q_positions, k_positions))


def bias_at(
    method: PositionEmbedding, variables: Variables, q_positions: Array, k_positions: Array
) -> Array:
    """``bias_of_heads`` at positions that broadcast to ``[B, T, S]``."""
    variables = {name: _as_float32(value) for name, value in variables.items()}
    heads = {
        name: axes.index("heads") if "heads" in (axes := method.variable_axes(name)) else None
        for name in variables
    }
    block = jnp.broadcast_shapes(q_positions.shape, k_positions.shape)

    def of_one_head(variables: Variables) -> Array:
        try:
            bias = method.bias(variables, q_positions, k_positions)
            _check_other_block(method, variables, q_positions, k_positions)
        except KeyError as error:
            error.add_note(
                f"{type(method).__name__}.bias was given {', '.join(variables) or 'no variables'}; "
                "method.init(key, shape).at_layer(0) has those of the first layer"
            )
            raise
        except (TypeError, ValueError) as error:
            if not variables or "broadcast" not in str(error):
                raise
            shapes = ", ".join(f"{name} {jnp.shape(value)}" for name, value in variables.items())
            raise ValueError(
                f"{type(method).__name__}.bias, for q_positions {q_positions.shape}, k_positions "
                f"{k_positions.shape} and {shapes} of one head: {error}. variable_axes says which "
                'variables have heads, as ("heads",)'
            ) from error
        shape = jnp.shape(bias)
        sizes = zip(shape[::-1], block[::-1], strict=False)
        if len(shape) > 3 or any(n not in (1, m) for n, m in sizes):
            raise ValueError(
                f"{type(method).__name__}.bias has shape {shape} for q_positions "
                f"{q_positions.shape} and k_positions {k_positions.shape}: expected what broadcasts"
                f" to {block}, the bias of one head; variable_axes says which variables have heads"
            )
        return jnp.broadcast_to(bias, block)

    if all(axis is None for axis in heads.values()):
        return of_one_head(variables)[:, None]
    return jax.vmap(of_one_head, in_axes=(heads,), out_axes=1)(variables)


def _check_other_block(
    method: PositionEmbedding, variables: Variables, q_positions: Array, k_positions: Array
) -> None:
    """Raises as ``bias`` does for a block in which no axis is as long as one of a variable.

    A variable of all heads would otherwise be taken for one of all keys where there are as many.
    """
    taken = {n for value in variables.values() for n in jnp.shape(value)} - {1}
    if taken.isdisjoint(q_positions.shape + k_positions.shape):
        return
    larger = max(taken) + 1

    def resized(positions: Array) -> jax.ShapeDtypeStruct:
        shape = tuple(n + larger if n in taken else n for n in positions.shape)
        return jax.ShapeDtypeStruct(shape, positions.dtype)

    jax.eval_shape(method.bias, variables, resized(q_positions), resized(k_positions))


def _as_float32(value: Array) -> Array:
    value = as_array(value)
    return value.astype(jnp.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value


def block_positions(q_positions: Array, k_positions: Array) -> tuple[Array, Array]:
    """``[B, T, 1]`` and ``[B, 1, S]``, which broadcast over a block of scores.

    Raises ValueError unless the positions are ``[B or 1, T]`` and ``[B or 1, S]``.
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
    """Whether a vector comes as a tuple of numbers, from the TPU kernel."""
    return isinstance(variable, tuple)


@dataclass(frozen=True)
class NoPE(PositionEmbedding):
    """No position embedding: the causal mask is the only source of order (see the base class).

        logits[i, j] = q_i.k_j / sqrt(H)

    Reference: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization
    in Transformers".
    """
