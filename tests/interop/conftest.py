"""What attention with a method should give, written from the hooks alone."""

import jax
import jax.numpy as jnp
import pytest

from fope_jax.position.base import bias_of_heads, has_hook


@pytest.fixture(scope="session")
def expected():
    """Causal attention of one layer: ``q [B, T, N, H]``, ``k, v [B, T, K, H]``, float32."""

    def run(method, variables, q, k, v, positions, mask):
        own = method.layers()[0]
        layer = own.select(variables)
        q, k = own.method.rotate(layer, own.method.tables(layer, positions, q.shape[-1]), q, k)
        scale = jnp.ones((1, 1)) if own.logit_scale is None else own.logit_scale(positions)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        sides = [(q, k)]
        if own.far_from is not None:
            sides = list(zip(*(jnp.split(x, 2, axis=-1) for x in (q, k)), strict=True))
        near, *far = (
            jnp.einsum("btnh,bsnh->bnts", *side, precision="highest") / v.shape[-1] ** 0.5
            for side in sides
        )
        distance = (positions[:, :, None] - positions[:, None, :])[:, None]
        logits = jnp.where(distance >= own.far_from, far[0], near) if far else near
        if own.window is not None:
            mask = mask & (distance < own.window)
        if own.chunk is not None:
            chunks = positions // own.chunk
            mask = mask & (chunks[:, None, :, None] == chunks[:, None, None, :])
        scaled = logits * scale[:, None, :, None]
        if has_hook(own.method, "bias"):
            scaled = scaled + bias_of_heads(own.method, layer, positions, positions)
        if has_hook(own.method, "contextual_bias"):
            seen = jnp.where(mask, logits, -jnp.inf)
            scaled = scaled + own.method.contextual_bias(layer, q, seen)
        logits = jnp.where(mask, scaled, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")

    return jax.jit(run, static_argnums=0)
