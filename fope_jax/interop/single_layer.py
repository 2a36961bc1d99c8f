"""A method in one layer of another model: its variables, and whether the layer can apply it."""

from __future__ import annotations

from fope_jax.model.backends import query_width
from fope_jax.position import ModelShape, PositionEmbedding
from fope_jax.position.base import Variables, has_hook
from fope_jax.typing import Array

_BIASES = ("bias", "contextual_bias", "running_bias")  # hooks


def layer_shape(
    num_heads: int, num_kv_heads: int, head_dim: int, d_model: int | None = None
) -> ModelShape:
    """The shape of a model with one attention layer; its width is that of all heads for None.

    ValueError unless each key-value head serves as many query heads.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads}, num_kv_heads={num_kv_heads}: expected a multiple of the second"
        )
    width = num_heads * head_dim if d_model is None else d_model
    return ModelShape(width, 1, num_heads, num_kv_heads, head_dim)


def draw_layer(
    method: PositionEmbedding, key: Array, shape: ModelShape
) -> tuple[Variables, Variables]:
    """Trained parameters and constants of a one-layer model, without the layer axis."""
    drawn = method.init(key, shape)
    return (
        drawn.model_params | {name: x[0] for name, x in drawn.layer_params.items()},
        drawn.model_constants | {name: x[0] for name, x in drawn.layer_constants.items()},
    )


def check_attends(method: PositionEmbedding, shape: ModelShape) -> None:
    """Raises ValueError unless a single attention layer can apply ``method``."""
    if not isinstance(method, PositionEmbedding):
        raise ValueError(f"method={method!r}: expected a position embedding, such as RoPE()")
    if _has_embed(method):
        raise ValueError(
            f"{method}: it is added to token embeddings and does nothing inside attention; "
            "use PositionEmbed on the embeddings"
        )
    if len(method.layers()) != 1:
        raise ValueError(
            f"{method}: its methods differ by layer and a module serves one layer; "
            "give each layer's module its own method"
        )
    method.check(shape)


def check_rotates(method: PositionEmbedding, shape: ModelShape) -> None:
    """Raises ValueError unless ``method`` only rotates q and k."""
    check_attends(method, shape)
    (layer,) = method.layers()
    does = None
    if any(has_hook(layer.method, hook) for hook in _BIASES):
        does = "has a bias"
    elif layer.hides_keys:
        does = "hides keys"
    elif layer.far_from is not None:
        does = "rotates near and far keys differently"
    if does is not None:
        raise ValueError(
            f"{method}: it {does}, which rotating q and k would leave out; use PositionAttention"
        )
    if (width := query_width(layer, shape)) != shape.head_dim:
        raise ValueError(
            f"{method}: it makes q and k {width} dimensions wide, and logits must still be divided "
            f"by the root of head_dim={shape.head_dim}; use PositionAttention"
        )


def check_embeds(method: PositionEmbedding, shape: ModelShape) -> None:
    """Raises ValueError unless ``method`` changes token embeddings, and does nothing else."""
    if not _has_embed(method):
        raise ValueError(
            f"{method}: it works inside attention and adds nothing to token embeddings; "
            "use PositionAttention"
        )
    method.check(shape)
    for layer in method.layers():
        does = None
        if layer.hides_keys:
            does = "hides keys"
        elif layer.logit_scale is not None:
            does = "scales logits"
        elif any(has_hook(layer.method, hook) for hook in ("rotate", *_BIASES)):
            does = "acts inside attention"
        if does is not None:
            raise ValueError(
                f"{method}: it also {does}, which adding to token embeddings would leave out; use "
                "PositionEmbed for what is added, and PositionAttention for the rest, around NoPE()"
            )


def _has_embed(method: PositionEmbedding) -> bool:
    return any(has_hook(layer.method, "embed") for layer in method.layers())
