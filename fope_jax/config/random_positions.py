"""Which position embeddings can be trained at random positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fope_jax.config.train import TrainConfig
from fope_jax.model.config import TransformerConfig
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.position.base import (
    Layer,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    bias_of_heads,
    embed_tokens,
    has_hook,
)


def check_random_positions(
    position: PositionEmbedding, train: TrainConfig, model: TransformerConfig
) -> None:
    """Raises ValueError if ``train.position_range`` does not go with the position embedding.

    A window, a chunk or a far version of keys counts tokens, which drawn positions do not; so does
    a factor on logits by the position of the query, and dynamic NTK the length of a row.
    """
    if train.position_range is None:
        return
    key, name = f"train.position_range = {train.position_range}", type(position).__name__
    limits, layers = position.limits, layer_pattern(model, position)
    if limits.max_length is not None and limits.max_length < train.position_range:
        raise ValueError(
            f"{key}: {name} is defined for positions below {limits.max_length}; draw from at most "
            "so many, or give the method a longer limit (learned: table_length, xpos: scale_base)"
        )
    problem = "its frequencies follow the length of a row" if limits.follows_length else None
    for layer in layers:
        problem = problem or _counts_tokens(layer)
    if problem:
        raise ValueError(f"{key}: {name} does not go with random positions: {problem}")
    if not _reads_positions(position, model.shape):
        raise ValueError(f"{key}: {name} reads no positions, so that drawing them changes nothing")
    if train.position_draw == "float":
        _check_floats(position, model.shape)


def _reads_positions(position: PositionEmbedding, shape: ModelShape) -> bool:
    """Whether any hook takes positions; tables around methods that do not (FoX) are empty."""
    methods = [layer.method for layer in position.layers()]
    if any(has_hook(method, hook) for method in methods for hook in ("embed", "bias")):
        return True

    def all_tables(owned: PositionVariables, positions: jax.Array) -> list:
        variables = owned.at_layer(0)
        return [
            layer.method.tables(layer.select(variables), positions, shape.head_dim)
            for layer in position.layers()
        ]

    owned = jax.eval_shape(lambda: position.init(jax.random.key(0), shape))
    tables = jax.eval_shape(all_tables, owned, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return bool(jax.tree.leaves(tables))


def _counts_tokens(layer: Layer) -> str | None:
    """What in a layer is a number of tokens."""
    for name in ("window", "chunk", "far_from"):
        if (tokens := getattr(layer, name)) is not None:
            return f"a layer's {name} of {tokens} counts tokens"
    if layer.logit_scale is not None:
        scale = jax.eval_shape(layer.logit_scale, jax.ShapeDtypeStruct((1, 2), jnp.int32))
        if scale.shape[-1] != 1:
            return "the factor on its logits takes a query's position for the number of its keys"
    return None


def _check_floats(position: PositionEmbedding, shape: ModelShape) -> None:
    """Raises ValueError if a hook takes whole positions only."""

    def call_hooks(owned: PositionVariables, x: jax.Array, positions: jax.Array) -> list:
        variables = owned.at_layer(0)
        out = [embed_tokens(position, variables, x, positions)]
        for layer in position.layers():
            own = layer.select(variables)
            out.append(layer.method.tables(own, positions, shape.head_dim))
            if has_hook(layer.method, "bias"):
                out.append(bias_of_heads(layer.method, own, positions, positions))
        return out

    owned = jax.eval_shape(lambda: position.init(jax.random.key(0), shape))
    x = jax.ShapeDtypeStruct((1, 2, shape.d_model), jnp.float32)
    try:
        jax.eval_shape(call_hooks, owned, x, jax.ShapeDtypeStruct((1, 2), jnp.float32))
    except TypeError as error:
        raise ValueError(
            f"train.position_draw = 'float': {type(position).__name__} takes whole positions only "
            f"({error}); accepted: 'subset'"
        ) from error
