"""The position embedding and the window of each layer, as config.json has them: one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from fope_jax.model.config import TransformerConfig
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.position import ByLayer, PositionEmbedding, SlidingWindow, name_of

T = TypeVar("T")


class LayerPosition(NamedTuple):
    """A layer's method, and its window in tokens; None is full attention."""

    method: PositionEmbedding
    window: int | None = None


def layer_positions(config: TransformerConfig, position: PositionEmbedding) -> list[LayerPosition]:
    """Method and window of each layer, in whichever of the two arguments they are stated.

    Raises as ``layer_pattern``, and for layers with more than a method and a window.

    >>> from fope_jax.position import NoPE, RoPE
    >>> config = TransformerConfig(vocab_size=8, d_model=8, num_layers=4, num_heads=2, mlp_dim=8)
    >>> layers = layer_positions(config, ByLayer((RoPE(), SlidingWindow(NoPE(), 8))))
    >>> [layer.window for layer in layers]
    [None, 8, None, 8]
    """
    pattern = layer_pattern(config, position)
    for layer in pattern:
        for field in ("chunk", "far_from", "logit_scale"):
            if getattr(layer, field) is not None:
                raise ValueError(
                    f"position.method={name_of(position)!r}: models of Hugging Face have no form "
                    f"of it, of its {field}"
                )
    layers = [LayerPosition(layer.method, layer.window) for layer in pattern]
    return layers * (config.num_layers // len(layers))


def from_layer_positions(
    layers: Sequence[LayerPosition],
) -> tuple[tuple[int | None, ...], PositionEmbedding]:
    """``model.windows`` and the position embedding that give these layers, in one form only.

    Where one method serves all layers, ``windows`` is the pattern; where methods differ, the
    windows are in the pattern of methods. Both repeat as soon as they can.
    """
    methods = [layer.method for layer in layers]
    if all(method == methods[0] for method in methods):
        windows = shortest_period([layer.window for layer in layers])
        return (() if windows == (None,) else windows), methods[0]
    return (), ByLayer(
        tuple(
            method if window is None else SlidingWindow(method, window)
            for method, window in shortest_period(layers)
        )
    )


def shortest_period(values: Sequence[T]) -> tuple[T, ...]:
    """The pattern that, repeated, gives ``values``; all of them where none does.

    >>> shortest_period([8, None, 8, None])
    (8, None)
    """
    values = list(values)
    return next(
        tuple(values[:size])
        for size in range(1, len(values) + 1)
        if len(values) % size == 0 and values == values[:size] * (len(values) // size)
    )
