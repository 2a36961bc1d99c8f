"""Mixing methods over layers and over the head, and logit scaling: equal to their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ALiBi,
    ByLayer,
    ByShare,
    FoPE,
    LogitScaling,
    ModelShape,
    NoPE,
    RoPE,
    XPos,
    inverse_frequencies,
    log_n_scale,
)

SHAPE = ModelShape(d_model=96, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=32)
POSITIONS = jnp.arange(11)[None]


def draw(*dims, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=dims), jnp.float32)


Q, K = draw(2, 11, 4, 32), draw(2, 11, 2, 32, seed=1)


def merged(variables, layer):
    return variables.at_layer(layer)


def test_each_layer_has_its_own_method():
    methods = (RoPE(theta=100.0), FoPE(40), ALiBi())
    mixed = ByLayer(methods)
    assert len(mixed.layers()) == 3
    variables = mixed.init(jax.random.key(0), SHAPE)
    assert {x.shape[0] for x in variables.layer_constants.values()} == {2}  # 6 layers / 3
    assert tuple(layer.method for layer in mixed.layers()) == methods
    rope, fope, alibi = (set(layer.select(merged(variables, 1))) for layer in mixed.layers())
    assert (rope, fope, alibi) == (set(), {"cos_coef", "sin_coef"}, {"slopes"})


def test_equal_methods_of_a_pattern_draw_their_own():
    variables = ByLayer((FoPE(40), FoPE(40))).init(jax.random.key(0), SHAPE)
    constants = variables.layer_constants
    assert not np.array_equal(constants["0.cos_coef"], constants["1.cos_coef"])


def test_a_pattern_does_not_rotate_by_itself():
    mixed = ByLayer((RoPE(), NoPE()))
    with pytest.raises(TypeError, match="layers"):
        mixed.rotate({}, None, Q, K)


def test_limits_and_frequencies_of_a_mix():
    mixed = ByLayer((XPos(), RoPE(), XPos(scale_base=100.0), NoPE()))
    assert mixed.limits.max_length == XPos(scale_base=100.0).limits.max_length
    assert ByLayer((RoPE(), NoPE())).limits.max_length is None
    grid = inverse_frequencies(32)
    np.testing.assert_array_equal(mixed.frequencies(32), np.concatenate([grid] * 3))
    assert ByShare((NoPE(), NoPE()), (0.5, 0.5)).frequencies(32) is None


def test_a_quarter_of_rope_is_partial_rotary():
    shared = ByShare((RoPE(), NoPE()), (0.25, 0.75))
    partial = RoPE(partial_rotary_factor=0.25)
    shared.check(SHAPE)
    ours = shared.rotate({}, shared.tables({}, POSITIONS, 32), Q, K)
    theirs = partial.rotate({}, partial.tables({}, POSITIONS, 32), Q, K)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(shared.frequencies(32), inverse_frequencies(8))


def test_shares_of_a_head_turn_apart():
    """Half RoPE, half FoPE with a matrix a query head: logits are the sum of both."""
    shared = ByShare((RoPE(), FoPE(40, heads="query")), (0.5, 0.5))
    shared.check(SHAPE)
    variables = merged(shared.init(jax.random.key(0), SHAPE), 3)
    q, k = shared.rotate(variables, shared.tables({}, POSITIONS, 32), Q, K)
    assert k.shape == (2, 11, 4, 32)
    rope, fope = shared.methods
    own = {name.removeprefix("1."): x for name, x in variables.items()}
    q1, k1 = rope.rotate({}, rope.tables({}, POSITIONS, 16), Q[..., :16], K[..., :16])
    q2, k2 = fope.rotate(own, fope.tables({}, POSITIONS, 16), Q[..., 16:], K[..., 16:])
    np.testing.assert_allclose(q, jnp.concatenate([q1, q2], axis=-1), atol=1e-6)
    k1 = jnp.repeat(k1, 2, axis=2)
    np.testing.assert_allclose(k, jnp.concatenate([k1, k2], axis=-1), atol=1e-6)


def test_log_n_scales_the_logits_of_far_queries():
    method = LogitScaling(RoPE(), training_length=8)
    (layer,) = method.layers()
    assert layer.method == RoPE() and layer.logit_scale is not None
    expected = np.maximum(np.log(np.arange(1, 12)) / np.log(8), 1)
    np.testing.assert_allclose(layer.logit_scale(POSITIONS)[0], expected, rtol=1e-5)
    within = log_n_scale(POSITIONS, 8, within=True)
    np.testing.assert_allclose(within[0], np.log(np.arange(1, 12)) / np.log(8), atol=1e-6)


def test_yarns_temperature_alone():
    method = LogitScaling(RoPE(), form="yarn", factor=4.0)
    (layer,) = method.layers()
    assert layer.method == RoPE() and layer.logit_scale is not None
    np.testing.assert_allclose(layer.logit_scale(POSITIONS), (0.1 * np.log(4.0) + 1) ** 2)


def test_logit_scaling_of_a_mix_is_in_every_layer():
    method = LogitScaling(ByLayer((RoPE(), ALiBi())), training_length=4)
    method.check(SHAPE)
    first, second = method.layers()
    assert (first.method, second.method) == (RoPE(), ALiBi())
    variables = method.init(jax.random.key(0), SHAPE)
    assert set(second.select(merged(variables, 0))) == {"slopes"}
    for layer in method.layers():
        assert layer.logit_scale is not None
        np.testing.assert_array_equal(layer.logit_scale(POSITIONS), log_n_scale(POSITIONS, 4))


def test_logit_scaling_of_some_layers_of_a_mix():
    """Llama 4 scales the layers without positions alone."""
    method = ByLayer((RoPE(), LogitScaling(NoPE(), training_length=4)))
    method.check(SHAPE)
    rotating, scaled = method.layers()
    assert rotating.logit_scale is None and scaled.logit_scale is not None
    assert scaled.method == NoPE() and scaled.scope == "1."
