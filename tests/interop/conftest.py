"""What attention with a method should give, written from the hooks alone."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def expected():
    """Causal attention of one layer: ``q [B, T, N, H]``, ``k, v [B, T, K, H]``, float32."""

    def run(method, variables, q, k, v, positions, mask):
        method, layer, tables = method.of_layer(
            0, variables, method.tables(variables, positions, q.shape[-1])
        )
        q, k = method.rotate(layer, tables, q, k)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / q.shape[-1] ** 0.5
        if method.has_bias:
            logits = logits + method.bias(layer, positions, positions)
        logits = jnp.where(mask, logits, -jnp.inf)
        if method.has_contextual_bias:
            logits = logits + method.contextual_bias(layer, q, logits)
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")

    return run
