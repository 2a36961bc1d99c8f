"""The position embedding and the window of each layer, as config.json has them: one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from fope_jax.position import ByLayer, PositionEmbedding, SlidingWindow

T = TypeVar("T")


class LayerPosition(NamedTuple):
    """A layer's method, and its window in tokens; None is full attention."""

    method: PositionEmbedding
    window: int | None = None


def layer_positions(
    position: PositionEmbedding, windows: Sequence[int | None], num_layers: int
) -> list[LayerPosition]:
    """Method and window of each layer, of ``model.windows`` and the position embedding.

    ValueError if a pattern does not fill the layers, or if both state a window of a layer.

    >>> from fope_jax.position import NoPE, RoPE
    >>> layers = layer_positions(ByLayer((RoPE(), SlidingWindow(NoPE(), 8))), (), 4)
    >>> [layer.window for layer in layers]
    [None, 8, None, 8]
    """
    layers = _repeat("position", _layers_of(position), num_layers)
    joined = []
    for (method, own), window in zip(
        layers, _repeat("windows", tuple(windows) or (None,), num_layers), strict=True
    ):
        if own is not None and window is not None:
            raise ValueError(
                f"windows={tuple(windows)}: position has windows of its own, {own} tokens; state "
                "each once"
            )
        joined.append(LayerPosition(method, window if own is None else own))
    return joined


def _repeat(name: str, pattern: Sequence[T], num_layers: int) -> list[T]:
    if num_layers % len(pattern):
        raise ValueError(
            f"{name} repeats after {len(pattern)} layers: num_layers={num_layers} is not a "
            "multiple of it"
        )
    return list(pattern) * (num_layers // len(pattern))


def _layers_of(position: PositionEmbedding) -> list[LayerPosition]:
    """One period; a method that is neither a pattern nor a window stands for itself."""
    if isinstance(position, ByLayer):
        return [layer for method in position.methods for layer in _layers_of(method)]
    if isinstance(position, SlidingWindow):
        return [layer._replace(window=position.window) for layer in _layers_of(position.inner)]
    return [LayerPosition(position)]


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
    values = list(values)
    return next(
        tuple(values[:size])
        for size in range(1, len(values) + 1)
        if len(values) % size == 0 and values == values[:size] * (len(values) // size)
    )
