"""Position embeddings for the attention of any Flax Linen model.

Trained variables are in ``params``. Constants such as FoPE's coefficients are in the collection
``position``, outside an optimizer's ``params``. Under ``nn.scan`` name both:
``variable_axes={"params": 0, "position": 0}``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fope_jax.interop import attention, single_layer
from fope_jax.position import ModelShape, PositionEmbedding
from fope_jax.position.base import Variables
from fope_jax.typing import Array

COLLECTION = "position"


class PositionAttention(nn.Module):
    """An ``attention_fn`` for ``nn.MultiHeadDotProductAttention`` with positions.

    It rotates queries and keys, adds the method's bias, and calls ``attention_fn``. Flax's key
    cache holds unrotated keys, so every decoding step rotates all of them.

    Attributes:
      method: any method that works inside attention.
      attention_fn: must take ``bias`` if the method has one.
      positions: of the queries, ``[T]``, ``[1, T]`` or ``[batch..., T]`` tokens since the start of
        each document; None counts from 0.
      key_positions: of the keys, if they differ from the queries'.
      inputs: ``[batch..., T, D]``, what queries and keys are projected from, for methods whose bias
        is made from it (FoX, Cable).
      decode: for self-attention with ``decode=True``: the single query is the newest key that the
        mask shows. A full cache raises ValueError, or gives NaN under ``jit``.

    >>> from fope_jax.position import FoPE
    >>> layer = nn.MultiHeadDotProductAttention(4, attention_fn=PositionAttention(FoPE(64)))
    >>> x = jnp.ones((2, 10, 32))
    >>> variables = layer.init(jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0]))
    >>> sorted(variables), sorted(variables["position"]["attention_fn"])
    (['params', 'position'], ['cos_coef', 'sin_coef'])
    """

    method: PositionEmbedding
    attention_fn: Callable[..., Array] = nn.dot_product_attention
    positions: Array | None = None
    key_positions: Array | None = None
    inputs: Array | None = None
    decode: bool = False

    # All arguments are named because Flax passes only those in the signature.
    @nn.compact
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: nn.Module | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Array:
        """See ``nn.dot_product_attention``; raises like ``interop.attention.attend``."""
        width = None if self.inputs is None else self.inputs.shape[-1]
        shape = single_layer.layer_shape(query.shape[-2], key.shape[-2], query.shape[-1], width)
        single_layer.check_attends(self.method, shape)
        is_full = None
        if self.decode:
            is_step = (
                mask is not None and query.shape[-3] == 1 and self.is_mutable_collection("cache")
            )
            if self.is_initializing() or is_step:
                last = self.variable("cache", "last_key", lambda: jnp.int32(-1))
            if is_step and not self.is_initializing():
                last.value, is_full = attention.decoding_step(mask, key.shape[-3], last.value)
        out = attention.attend(
            self.method,
            _variables(self, self.method, shape),
            self.attention_fn,
            query,
            key,
            value,
            mask=mask,
            positions=self.positions,
            key_positions=self.key_positions,
            inputs=self.inputs,
            decode=self.decode,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            force_fp32_for_softmax=force_fp32_for_softmax,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        return out if is_full is None else jnp.where(is_full, jnp.nan, out)


class Rotary(nn.Module):
    """Rotates queries and keys, for custom attention.

    The attention must be causal if ``method.limits.needs_causal_mask``.

    >>> from fope_jax.position import FoPE
    >>> q = jnp.ones((2, 10, 4, 16))
    >>> (q, k), variables = Rotary(FoPE(64)).init_with_output(jax.random.key(0), q, q)
    >>> sorted(variables)
    ['position']
    """

    method: PositionEmbedding

    @nn.compact
    def __call__(
        self, q: Array, k: Array, positions: Array | None = None, key_positions: Array | None = None
    ) -> tuple[Array, Array]:
        """Rotates ``q [B, T, N, H]`` and ``k [B, S, K, H]``; see ``interop.nnx.Rotary``."""
        shape = single_layer.layer_shape(q.shape[-2], k.shape[-2], q.shape[-1])
        single_layer.check_rotates(self.method, shape)
        variables = _variables(self, self.method, shape)
        return attention.rotate(self.method, variables, q, k, positions, key_positions)


class PositionEmbed(nn.Module):
    """Changes token embeddings, for sinusoidal and learned positions.

    ``Sinusoidal()`` expects embeddings of standard deviation 0.02. ``nn.Embed`` draws them at
    D^-1/2: set ``amplitude=d_model**-0.5``.
    """

    method: PositionEmbedding

    @nn.compact
    def __call__(self, x: Array, positions: Array | None = None) -> Array:
        """Changes ``x [B, T, D]`` at ``positions`` ``[T]``, ``[1, T]`` or ``[B, T]``.

        ValueError if the method does not change embeddings, or positions do not fit.
        """
        shape = ModelShape(x.shape[-1], 1, 1, 1, x.shape[-1])
        single_layer.check_embeds(self.method, shape)
        return attention.embed(self.method, _variables(self, self.method, shape), x, positions)


def _variables(module: nn.Module, method: PositionEmbedding, shape: ModelShape) -> Variables:
    """The module's variables by name, drawn if they do not exist yet."""

    def draw(key: Array) -> tuple[Variables, Variables]:
        return single_layer.draw_layer(method, key, shape)

    # One draw for all variables. Flax also calls the initialisers of existing parameters.
    draw_once = functools.cache(lambda: draw(module.make_rng("params")))
    is_new = module.is_initializing()
    if is_new:
        draw_once()
    params, constants = jax.eval_shape(draw, jax.random.key(0))
    variables = {
        name: module.param(name, lambda key, n=name: (draw_once() if is_new else draw(key))[0][n])
        for name in params
    }
    for name in constants:
        variable = module.variable(COLLECTION, name, lambda n=name: draw_once()[1][n])
        variables[name] = variable.value
    return variables
