"""Position embeddings for the attention of any Flax NNX model.

Trained variables are ``nnx.Param``. Constants such as FoPE's coefficients are ``PositionConstant``
variables, which are saved but invisible to an optimizer over ``nnx.Param``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fope_jax.interop import attention, single_layer
from fope_jax.model.transformer import nnx_variables, variable_values
from fope_jax.position import ModelShape, PositionEmbedding
from fope_jax.typing import Array


class Positions(nnx.Variable):
    """Positions of tokens, int32 state that a training step overwrites for packed documents."""


class _PositionModule(nnx.Module):
    """A method with its variables for one layer."""

    def __init__(self, method: PositionEmbedding, shape: ModelShape, rngs: nnx.Rngs):
        params, constants = single_layer.draw_layer(method, rngs.params(), shape)
        self.method = method
        self.shape = shape
        self.variables = nnx_variables(params, constants)

    def _check_heads(self, q: Array, k: Array) -> None:
        given = (q.shape[-2], k.shape[-2], q.shape[-1])
        declared = (self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim)
        if given != declared:
            raise ValueError(
                "num_heads, num_kv_heads, head_dim = {}, {}, {} come in: ".format(*given)
                + "{}, {}, {} were declared".format(*declared)
            )


class PositionAttention(_PositionModule):
    """An ``attention_fn`` for ``nnx.MultiHeadAttention`` with positions.

    It rotates queries and keys, adds the method's bias, and calls ``attention_fn``. Flax's key
    cache holds unrotated keys, so every decoding step rotates all of them.

    >>> from fope_jax.position import FoPE
    >>> fope = PositionAttention(FoPE(64), num_heads=4, head_dim=8, rngs=nnx.Rngs(0))
    >>> layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=fope, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 10, 32)), is_causal=True).shape
    (2, 10, 32)
    """

    def __init__(
        self,
        method: PositionEmbedding,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        d_model: int | None = None,
        attention_fn: Callable[..., Array] = nnx.dot_product_attention,
        positions: Array | None = None,
        decode: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draws the method's variables; ValueError if one attention layer cannot apply the method.

        Args:
          method: any method that works inside attention.
          num_heads, head_dim: N and H.
          num_kv_heads: key-value heads K; None means N.
          d_model: width of what ``set_inputs`` takes; None means N H.
          attention_fn: must take ``bias`` if the method has one.
          positions: ``[T]``, ``[1, T]`` or ``[batch..., T]`` tokens since the start of each
            document; None counts from 0. State that ``set_positions`` overwrites.
          decode: for self-attention with Flax's key cache: the single query is the newest key in
            the mask, whatever ``is_causal`` is. A full cache raises ValueError, or gives NaN under
            ``jit``.
          rngs: its ``params`` stream is drawn from.
        """
        shape = single_layer.layer_shape(num_heads, num_kv_heads or num_heads, head_dim, d_model)
        single_layer.check_attends(method, shape)
        super().__init__(method, shape, rngs)
        self.attention_fn = attention_fn
        self.decode = decode
        self.last_key = nnx.data(nnx.Cache(jnp.int32(-1)) if decode else None)
        self.positions = nnx.data(None)
        self.inputs = nnx.data(None)
        self.set_positions(positions)

    def set_positions(self, positions: Array | None) -> None:
        """Sets the next calls' positions, None counts from 0; ValueError unless 32-bit integers."""
        if positions is not None:  # checked before jax truncates to 32 bits
            positions = attention.int32_positions(positions, "positions")
        self.positions = None if positions is None else Positions(jnp.asarray(positions))

    def set_inputs(self, inputs: Array) -> None:
        """Sets what the next call's queries and keys are projected from, ``[batch..., T, D]``.

        For methods whose bias is made from it (FoX, Cable). One call uses it up.
        """
        if inputs.shape[-1] != self.shape.d_model:
            raise ValueError(
                f"inputs have shape {inputs.shape}: d_model={self.shape.d_model} was declared"
            )
        self.inputs = nnx.data(inputs)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: Array | None = None,
        is_causal: bool = False,
        **options: Any,
    ) -> Array:
        """See ``nnx.dot_product_attention``; ValueError for undeclared heads or as ``attend``."""
        self._check_heads(query, key)
        inputs, self.inputs = self.inputs, nnx.data(None)  # an activation is no state
        is_full = None
        if self.decode and query.shape[-3] == 1 and mask is not None:
            if self.last_key is None:  # ``decode`` was set after construction
                self.last_key = nnx.Cache(jnp.int32(-1))
            step = attention.decoding_step(mask, key.shape[-3], self.last_key[...])
            self.last_key[...], is_full = step
        out = attention.attend(
            self.method,
            variable_values(self.variables),
            self.attention_fn,
            query,
            key,
            value,
            mask=mask,
            is_causal=is_causal,
            positions=None if self.positions is None else self.positions[...],
            inputs=inputs,
            decode=self.decode,
            **options,
        )
        return out if is_full is None else jnp.where(is_full, jnp.nan, out)


class Rotary(_PositionModule):
    """Rotates queries and keys, for custom attention.

    The attention must be causal if ``method.limits.needs_causal_mask``.

    >>> from fope_jax.position import FoPE
    >>> rotary = Rotary(FoPE(64), num_heads=4, head_dim=16, rngs=nnx.Rngs(0))
    >>> q, k = rotary(jnp.ones((2, 10, 4, 16)), jnp.ones((2, 10, 4, 16)))
    >>> len(nnx.to_flat_state(nnx.state(rotary, nnx.Param)))
    0
    """

    def __init__(
        self,
        method: PositionEmbedding,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Draws the method's variables; ValueError if it does more than rotate or does not fit."""
        shape = single_layer.layer_shape(num_heads, num_kv_heads or num_heads, head_dim)
        single_layer.check_rotates(method, shape)
        super().__init__(method, shape, rngs)

    def __call__(
        self, q: Array, k: Array, positions: Array | None = None, key_positions: Array | None = None
    ) -> tuple[Array, Array]:
        """Rotates ``q [B, T, N, H]`` and ``k [B, S, K, H]``.

        ``positions`` of the queries are ``[T]``, ``[1, T]`` or ``[B, T]``; None counts from 0, so a
        loop that decodes one token at a time must give them. None for ``key_positions`` takes the
        queries'. With a matrix per query head, k is returned with N heads. ValueError for heads
        that were not declared or positions that do not fit.
        """
        self._check_heads(q, k)
        return attention.rotate(
            self.method, variable_values(self.variables), q, k, positions, key_positions
        )


class PositionEmbed(_PositionModule):
    """Changes token embeddings, for sinusoidal and learned positions.

    >>> from fope_jax.position import Sinusoidal
    >>> embed = PositionEmbed(Sinusoidal(), d_model=32, rngs=nnx.Rngs(0))
    >>> embed(jnp.ones((2, 10, 32))).shape
    (2, 10, 32)
    """

    def __init__(self, method: PositionEmbedding, *, d_model: int, rngs: nnx.Rngs):
        """Draws the method's variables; ValueError if it does not change embeddings ``[B, T, D]``.

        ``Sinusoidal()`` expects embeddings of standard deviation 0.02. ``nnx.Embed`` draws them at
        D^-1/2: set ``amplitude=d_model**-0.5``.
        """
        shape = ModelShape(d_model, 1, 1, 1, d_model)
        single_layer.check_embeds(method, shape)
        super().__init__(method, shape, rngs)

    def __call__(self, x: Array, positions: Array | None = None) -> Array:
        """Changes ``x [B, T, D]`` at ``positions`` ``[T]``, ``[1, T]`` or ``[B, T]``."""
        return attention.embed(self.method, variable_values(self.variables), x, positions)
