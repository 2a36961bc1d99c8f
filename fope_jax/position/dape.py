"""DAPE: a bias on distance that a small network adapts to the scores of all heads."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fope_jax.position.base import (
    Limits,
    ModelShape,
    PositionEmbedding,
    PositionVariables,
    Variables,
    bias_at,
    has_hook,
    select,
    with_scope,
)
from fope_jax.position.checks import check_whole
from fope_jax.position.relative_bias import Kerple
from fope_jax.typing import Array

_SLOPE = 0.01  # of the leaky ReLU below 0, as in the authors' code
_INNER = "inner."


def dape_network(
    logits: Array,
    bias: Array,
    *,
    hidden_weight: Array,
    hidden_bias: Array,
    out_weight: Array,
    out_bias: Array,
) -> Array:
    """The network of DAPE, at each pair of a query and a key.

        f(z, b) = leaky_relu([z, b] w1 + b1) w2 + b2

    Args:
      logits: z, scaled products of q and k of all heads, ``[B, N, T, S]``, finite.
      bias: b, the bias of all heads, ``[B or 1, N or 1, T, S]``.
      hidden_weight, hidden_bias: w1 ``[2 N, W]``, the rows of the logits first, and b1 ``[W]``.
      out_weight, out_bias: w2 ``[W, N]`` and b2 ``[N]``.

    Returns ``[B, N, T, S]`` float32. Raises ValueError if the heads do not fit w1.

    Reference: Zheng et al. 2024 (DAPE), and its released code, DAPE.py.
    """
    heads = logits.shape[1]
    if hidden_weight.shape[0] != 2 * heads:
        raise ValueError(
            f"hidden_weight {hidden_weight.shape} for {heads} heads: expected [2 N, W]. The "
            "network reads all heads of a layer, so that devices cannot share them: mesh.tensor = 1"
        )
    bias = jnp.broadcast_to(bias, (bias.shape[0], heads, *bias.shape[2:]))
    product = functools.partial(jnp.einsum, "bnts,nw->bwts", precision="highest")
    hidden = product(logits, hidden_weight[:heads]) + product(bias, hidden_weight[heads:])
    hidden = jax.nn.leaky_relu(hidden + hidden_bias.reshape((1, -1, 1, 1)), _SLOPE)
    out = jnp.einsum("bwts,wn->bnts", hidden, out_weight, precision="highest")
    return out + out_bias.reshape((1, -1, 1, 1))


@dataclass(frozen=True)
class DAPE(PositionEmbedding):
    """Data-adaptive position encoding: a bias on distance, corrected by what q and k say.

        logits = z + b + f(z, b),  z = q.k / sqrt(H),  b the bias of ``inner``

    f is a network of one hidden layer over the 2 N numbers of a pair of tokens, one a layer of the
    model, initialised uniform within 1 / sqrt(inputs of the layer). Positions of b are counted in
    each row of scores, among the keys that the query sees, so attention must be causal; a row is
    needed whole, as for CoPE. All heads of a layer must be on one device. Weight decay pulls f to 0
    and leaves ``inner``.

    Knobs:
      inner: a method that adds a bias and nothing else: ``Kerple()`` as in most of the paper,
        ``ALiBi()``, ``FIRE()`` (the authors' code has a leaky ReLU inside FIRE too, ours the one of
        FIRE's paper), ``T5Bias()``.
      mlp_width: hidden width W of f; 32 in the paper.

    Reference: Zheng et al. 2024, "DAPE: Data-Adaptive Positional Encoding for Length
    Extrapolation", and its released code, DAPE.py.
    """

    kind: ClassVar[str] = "contextual"
    extends: ClassVar[str] = "as the bias inside, adapted to the text"

    inner: PositionEmbedding = Kerple()
    mlp_width: int = 32

    def __post_init__(self) -> None:
        check_whole("mlp_width", self.mlp_width, 1, "hidden units of f")
        others = ("embed", "tables", "rotate", "contextual_bias", "running_bias", "layers")
        if (
            not isinstance(self.inner, PositionEmbedding)
            or not has_hook(self.inner, "bias")
            or any(has_hook(self.inner, hook) for hook in others)
        ):
            raise ValueError(
                f"inner={self.inner!r}: expected a method that adds a bias alone, such as Kerple()"
            )

    def check(self, shape: ModelShape) -> None:
        self.inner.check(shape)

    @property
    def limits(self) -> Limits:
        return self.inner.limits._replace(needs_causal_mask=True)

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        inner_key, own_key = jax.random.split(key)
        inner, network = with_scope(self.inner.init(inner_key, shape), _INNER), {}
        heads, width = shape.num_heads, self.mlp_width
        sizes = {
            "hidden_weight": ((2 * heads, width), 2 * heads),
            "hidden_bias": ((width,), 2 * heads),
            "out_weight": ((width, heads), width),
            "out_bias": ((heads,), width),
        }
        keys = jax.random.split(own_key, len(sizes))
        for name_key, (name, (size, inputs)) in zip(keys, sizes.items(), strict=True):
            bound = 1 / math.sqrt(inputs)
            network[name] = jax.random.uniform(
                name_key, (shape.num_layers, *size), jnp.float32, -bound, bound
            )
        return dataclasses.replace(inner, layer_params=inner.layer_params | network)

    def contextual_bias(self, variables: Variables, q: Array, logits: Array) -> Array:
        is_visible = logits[:, 0] > -jnp.inf
        counted = jnp.cumsum(is_visible, axis=-1, dtype=jnp.int32)
        places = counted[..., -1:] - 1, jnp.maximum(counted, 1) - 1
        bias = bias_at(self.inner, select(variables, _INNER), *places)
        names = ("hidden_weight", "hidden_bias", "out_weight", "out_bias")
        network = {name: jnp.asarray(variables[name], jnp.float32) for name in names}
        finite = jnp.where(is_visible[:, None], logits, 0.0)
        return bias + dape_network(finite, bias, **network)
