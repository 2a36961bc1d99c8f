"""Positions with fractions of a token through the whole model, in both forms of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.data.random_positions import PositionDraw
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer
from fope_jax.position import ALiBi, ByLayer, PositionInterpolation, RoPE

SIZES = {"vocab_size": 61, "d_model": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 24}
SLOPES = (0.5, 0.03)
HALF = ByLayer((RoPE(scaling=(PositionInterpolation(2.0),)), ALiBi(tuple(m / 2 for m in SLOPES))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention", ["chunked", pytest.param("reference", marks=pytest.mark.slow)]
)
def test_half_positions_are_positions_at_half_the_frequency(attention):
    """And half the slope; two packed documents and padding, gradients included."""
    config = TransformerConfig(
        **SIZES, attention=attention, attention_block=8, init_std=0.3, scan_layers=False
    )
    segments = np.array([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24])
    tokens = np.random.default_rng(0).integers(0, 61, segments.shape).astype(np.int32)
    whole = PositionDraw(2048, "subset", seed=1).positions(segments, [0])
    assert (whole % 2).any()

    def loss(method, positions):
        graphdef, params, rest = nnx.split(
            Transformer(config, method, rngs=nnx.Rngs(0)), nnx.Param, ...
        )

        def of_params(params):
            logits = nnx.merge(graphdef, params, rest)(tokens, positions, segments)
            return jnp.sum(jnp.where(segments[..., None] > 0, logits**2, 0.0)), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params)
        return np.asarray(logits)[segments > 0], jax.tree.leaves(gradient)

    expected, expected_gradient = loss(HALF, whole)
    found, gradient = loss(ByLayer((RoPE(), ALiBi(SLOPES))), (whole / 2).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for a, b in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
