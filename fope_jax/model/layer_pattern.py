"""What each layer does with positions: the method's own pattern with the windows of the model."""

from __future__ import annotations

import math

from fope_jax.model.config import TransformerConfig
from fope_jax.position.base import Layer, PositionEmbedding
from fope_jax.position.checks import check_hashable


def layer_pattern(config: TransformerConfig, position: PositionEmbedding) -> tuple[Layer, ...]:
    """The layers of one period; layer l of the model is entry ``l mod P``.

    The method repeats after ``len(position.layers())`` layers and ``config.windows`` after their
    number; P is their least common multiple. ValueError if P does not divide the number of layers,
    if method and configuration both limit what a query sees, or for a knob that is a list or array.

    >>> from fope_jax.position import ALiBi, ByLayer, NoPE, RoPE
    >>> sizes = dict(vocab_size=8, d_model=8, num_layers=8, num_heads=2, mlp_dim=8)
    >>> config = TransformerConfig(**sizes, windows=(512, 512, 512, None))
    >>> [layer.window for layer in layer_pattern(config, ALiBi())]
    [512, 512, 512, None]
    >>> [type(layer.method).__name__ for layer in layer_pattern(config, ByLayer((RoPE(), NoPE())))]
    ['RoPE', 'NoPE', 'RoPE', 'NoPE']
    """
    check_hashable(position)
    layers, windows, name = position.layers(), config.windows, type(position).__name__
    period = math.lcm(len(layers), max(1, len(windows)))
    if config.num_layers % period:
        of_windows = f", with windows of {len(windows)} after {period}" if windows else ""
        raise ValueError(
            f"{name} repeats after {len(layers)} layers{of_windows}: "
            f"num_layers={config.num_layers} is not a multiple of it; a pattern that ends within a "
            "period is written out with an entry for each layer"
        )
    for layer in layers if windows else ():
        for limit in ("window", "chunk"):
            if getattr(layer, limit) is not None:
                raise ValueError(
                    f"model.windows={windows}: position {name} has {limit}="
                    f"{getattr(layer, limit)} itself; state it in one place"
                )
    if not windows:
        return layers
    return tuple(
        layers[index % len(layers)]._replace(window=windows[index % len(windows)])
        for index in range(period)
    )
