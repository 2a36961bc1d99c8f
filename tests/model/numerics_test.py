"""Loss and gradient under the strict settings of tests/position/numerics_test.py."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.model.config import TransformerConfig
from fope_jax.model.losses import loss_sums
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import ALiBi, ByLayer, CoPE, DynamicNTK, FoPE, LogitScaling, RoPE

LENGTH = 21
METHODS = {
    "rope-dynamic-ntk": RoPE(scaling=(DynamicNTK(4.0, 8),)),
    "fope": FoPE(16),
    "alibi-log-n-cope": ByLayer((ALiBi(), LogitScaling(CoPE(4, 0.5), training_length=8))),
}
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug NaN": lambda: jax.debug_nans(True),
}


def case(name, dtype):
    """A loss with its logits as a function of the parameters: packed documents and padding."""
    config = TransformerConfig(
        vocab_size=31,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=24,
        dtype=dtype,
        attention="chunked",
        attention_block=8,
        qk_norm="head",
        init_std=0.3,
    )
    graphdef, params, constants = split(Transformer(config, METHODS[name], rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 31, (2, LENGTH)).astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(LENGTH - 12)])[None].astype(np.int32)
    segments = np.repeat([1, 2, 0], [12, LENGTH - 15, 3])[None].astype(np.int32)
    batch = [jnp.asarray(np.broadcast_to(x, tokens.shape)) for x in (tokens, positions, segments)]

    def loss(params):
        model = merge(graphdef, params, constants)
        hidden = model.hidden(*batch)
        weights = (batch[2] > 0).astype(jnp.float32)
        sums = loss_sums(hidden, model.unembedding_matrix(), batch[0], weights)
        return sums.nats, model.unembed(hidden)

    return jax.value_and_grad(loss, has_aux=True), params


@pytest.mark.slow  # position and interop have their parts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient(name, dtype):
    run, params = case(name, dtype)
    expected = jax.jit(run)(params)
    for setting in SETTINGS:
        with SETTINGS[setting]():
            jax.eval_shape(run, params)
    with contextlib.ExitStack() as stack:
        for enter in SETTINGS.values():
            stack.enter_context(enter())
        found = jax.jit(run)(params)
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tolerance * (1e-3 + np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_positions_of_another_integer_dtype(dtype):
    """They are int32 before anything is subtracted or masked with them."""
    config = TransformerConfig(
        vocab_size=31, d_model=16, num_layers=1, num_heads=2, mlp_dim=24, attention_block=8
    )
    model = Transformer(config, ALiBi(), rngs=nnx.Rngs(0))
    tokens, segments = np.arange(20, dtype=np.int32)[None], np.ones((1, 20), np.int32)
    positions = np.arange(20)[None]
    expected = model(tokens, positions.astype(np.int32), segments)
    found = model(tokens, jnp.asarray(positions, dtype), segments)
    np.testing.assert_array_equal(found, expected)
