"""What is looked at is what the model computes: its logits lead to its own outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.model.config import TransformerConfig
from fope_jax.model.layers import project_from_heads, rms_norm, swiglu
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import (
    ALiBi,
    ByLayer,
    CoPE,
    FoPE,
    FoX,
    LogitScaling,
    PoPE,
    RoPE,
    SlidingWindow,
)
from fope_jax.spectrum import capture
from fope_jax.spectrum.capture import layer_logits, mean_by_distance, observer

METHODS = {
    "fope": (FoPE(32, heads="query"), {}),
    "alibi": (ALiBi(), {"scan_layers": False, "remat": "full"}),
    "cope": (CoPE(init_std=0.5), {}),
    "by layer": (ByLayer((RoPE(), ALiBi())), {"qk_norm": "head"}),
    "fox": (SlidingWindow(FoX(rotation=PoPE()), 7), {}),
}


def make(method, **changes):
    config = TransformerConfig(
        vocab_size=50,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=24,
        init_std=0.3,
        **changes,
    )
    return Transformer(config, method, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_logits_that_are_seen_are_those_the_model_attends_with(name):
    """From each layer's logits and values to what the next layer reads, and to the end."""
    method, changes = METHODS[name]
    model = make(method, **changes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 24)), jnp.int32)
    positions = jnp.arange(24, dtype=jnp.int32)[None]
    segments = jnp.ones_like(positions)

    graphdef, *arrays = split(model)

    @jax.jit
    def look(arrays):
        model = merge(graphdef, *arrays)
        hidden, (x, logits, v) = model.forward(
            tokens, positions, segments, lambda a: (a.x, layer_logits(a), a.v)
        )
        ends = []
        for index in range(2):
            weights = {name: value[...][index] for name, value in model.layers.items()}
            values = jnp.repeat(v[index], 4 // v.shape[3], axis=2)
            attended = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits[index]), values)
            y = x[index] + project_from_heads(attended, weights["out"])
            inner = rms_norm(y, weights["mlp_norm"], 1e-6)
            ends.append(y + swiglu(inner, weights["gate"], weights["up"], weights["down"]))
        plain = model.hidden(tokens, positions, segments)
        return hidden, plain, x, ends, rms_norm(ends[1], model.final_norm[...], 1e-6)

    hidden, plain, x, ends, last = look(arrays)
    np.testing.assert_allclose(hidden, plain, atol=1e-5)  # looking changes nothing
    np.testing.assert_allclose(ends[0], x[1], atol=1e-5 * np.abs(x[1]).max())
    np.testing.assert_allclose(last, hidden, atol=2e-5)


def test_means_by_distance():
    logits = np.random.default_rng(1).standard_normal((3, 7, 7)).astype(np.float32)
    hidden = np.where(np.tri(7, dtype=bool), logits, -np.inf)
    expected = [[np.diagonal(head, -d).mean() for d in range(7)] for head in logits]
    np.testing.assert_allclose(mean_by_distance(jnp.asarray(hidden)), expected, atol=1e-6)


def test_attention_of_bias_alone_has_the_known_entropy_and_distance():
    """With keys of zero, ALiBi's softmax is a geometric series for every text."""
    graphdef, params, constants = split(make(ALiBi()))
    params["layers"]["key"] = jnp.zeros_like(params["layers"]["key"])
    seen = observer(merge(graphdef, params, constants))(np.arange(30))
    slopes = 2.0 ** -(8 * np.arange(1, 5) / 4)
    distances = np.arange(30)
    np.testing.assert_allclose(seen.profile[1], -np.outer(slopes, distances), atol=1e-5)
    weights = np.exp(-np.outer(slopes, distances))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(seen.distance[0, :, -1], weights @ distances, rtol=1e-4)
    entropy = -np.sum(weights * np.log(weights), axis=1)
    np.testing.assert_allclose(seen.entropy[0, :, -1], entropy, rtol=1e-4)
    np.testing.assert_allclose(seen.entropy[..., 0], 0, atol=1e-6)
    assert seen.q.shape == (2, 30, 4, 4) and seen.k.shape == (2, 30, 2, 4)
    gaps = distances[:, None] - distances
    square = np.mean(np.outer(slopes, gaps[gaps >= 0]) ** 2, axis=1)
    np.testing.assert_allclose(seen.square[1], square, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["fox", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fope", "cope", "log n"))]
)
def test_logits_in_blocks_of_queries_are_those_of_the_whole_window(name, monkeypatch):
    methods = METHODS | {"log n": (LogitScaling(RoPE(), training_length=8), {})}
    method, changes = methods[name]
    length = 29  # a prime, so that the last block is smaller
    model, tokens = make(method, **changes), np.random.default_rng(0).integers(0, 50, length)
    whole = observer(model)(tokens)
    monkeypatch.setattr(capture, "LOGITS_IN_MEMORY", 4 * length * 7)  # of 7 queries
    assert capture._block_size(length, 4) == 6
    blocks = observer(model)(tokens)
    for field, expected in whole._asdict().items():
        np.testing.assert_allclose(getattr(blocks, field), expected, rtol=2e-5, atol=2e-6)


def test_a_window_hides_keys_from_attention_and_not_from_the_profile():
    """Zero keys and a window of 5: even weights on 5 keys; the profile is ALiBi's to the end."""
    seen = [
        observer(merge(graphdef, zero_keys(params), constants))(np.arange(30))
        for graphdef, params, constants in (
            split(make(method)) for method in (ALiBi(), SlidingWindow(ALiBi(), 5))
        )
    ]
    np.testing.assert_array_equal(seen[0].profile, seen[1].profile)
    np.testing.assert_array_equal(seen[0].square, seen[1].square)
    slopes, distances = 2.0 ** -(8 * np.arange(1, 5) / 4), np.arange(5)
    weights = np.exp(-np.outer(slopes, distances))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(seen[1].distance[0, :, -1], weights @ distances, rtol=1e-4)


def zero_keys(params):
    layers = params["layers"] | {"key": jnp.zeros_like(params["layers"]["key"])}
    return params | {"layers": layers}


def test_q_and_k_are_as_wide_as_after_the_rotation():
    seen = observer(make(PoPE()))(np.arange(9))
    assert seen.q.shape == seen.turned_q.shape == (2, 9, 4, 8)
    np.testing.assert_allclose(seen.q[:, 0], seen.turned_q[:, 0], atol=1e-6)  # position 0
    assert np.abs(seen.k - seen.turned_k).max() > 0.1
