"""A method that uses every hook of a layer at once, for tests of paths against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position import RoPE
from fope_jax.position.base import Layer, PositionVariables


@dataclasses.dataclass(frozen=True)
class Everything(RoPE):
    """A rotation whose far version has another base, with a gate a head that forgets."""

    def init(self, key, shape):
        sizes = (shape.num_layers, shape.d_model, shape.num_heads)
        gates = jax.random.normal(key, sizes) / np.sqrt(shape.d_model)
        return PositionVariables(layer_params={"gates": gates})

    def variable_axes(self, name):
        return ("embed", "heads")

    def tables(self, variables, positions, head_dim):
        near = super().tables(variables, positions, head_dim)
        return near, RoPE(theta=3.0).tables({}, positions, head_dim)

    def rotate(self, variables, tables, q, k):
        versions = [super(Everything, self).rotate(variables, table, q, k) for table in tables]
        return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*versions, strict=True))

    def running_bias(self, variables, x):
        gates = variables["gates"].astype(jnp.float32)
        return jax.nn.log_sigmoid(jnp.einsum("btd,dn->btn", x.astype(jnp.float32), gates) + 1.0)

    def layers(self):
        return (Layer(self, far_from=4),)
