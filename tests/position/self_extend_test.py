"""Self-Extend and ReRoPE: the authors' attention, and the distances that each promises."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ALiBi,
    ByLayer,
    ByShare,
    DynamicNTK,
    FoPE,
    LocalChunks,
    LogitScaling,
    ModelShape,
    NoPE,
    ReRoPE,
    RoPE,
    SelfExtend,
    Sinusoidal,
    SlidingWindow,
    XPos,
    YaRN,
    from_spec,
    to_spec,
)

SHAPE = ModelShape(d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
GOLDENS = Path(__file__).parents[1] / "goldens/far_distances.npz"
ROPE = RoPE(theta=100.0)


@cache
def draw(length, batch=1):
    random = np.random.default_rng(0)
    sizes = (SHAPE.num_heads, SHAPE.num_kv_heads)
    return [jnp.asarray(random.normal(size=(batch, length, n, 16)), jnp.float32) for n in sizes]


@partial(jax.jit, static_argnums=0)
def logits(layer, q, k, positions, variables=None):
    """``[B, N, T, S]``, each key by the version that its distance chooses."""
    variables = variables or {}
    tables = layer.method.tables(variables, positions, q.shape[-1])
    head_dim = q.shape[-1]
    q, k = layer.method.rotate(variables, tables, q, k)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    if layer.logit_scale is not None:
        q = q * layer.logit_scale(positions)[:, :, None, None]
    near, far = (
        jnp.einsum("btnh,bsnh->bnts", *pair, precision="highest") * head_dim**-0.5
        for pair in zip(jnp.split(q, 2, -1), jnp.split(k, 2, -1), strict=True)
    )
    distance = positions[:, :, None] - positions[:, None, :]
    return jnp.where((distance >= layer.far_from)[:, None], far, near)


def causal(scores):
    length = scores.shape[-1]
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)


CASES = {
    "self_extend": SelfExtend(ROPE, window=12, group=4),
    "self_extend_log_n": LogitScaling(SelfExtend(ROPE, window=9, group=3), training_length=16),
    "rerope": LogitScaling(ReRoPE(ROPE, window=10), training_length=16),
    "leaky_rerope": LogitScaling(ReRoPE(ROPE, window=10, leak=4), training_length=16),
}


@pytest.mark.fast("self_extend", "rerope")
@pytest.mark.parametrize("case", CASES)
def test_attention_of_the_authors_code(case):
    with np.load(GOLDENS) as arrays:
        q, k, weights = (arrays[f"{case}/{name}"] for name in ("q", "k", "weights"))
    (layer,) = CASES[case].layers()
    ours = jax.nn.softmax(causal(logits(layer, q, k, np.arange(q.shape[1])[None])))
    np.testing.assert_allclose(ours, weights, atol=2e-6)


def logits_at_distances(method, q, k, distances):
    """What plain RoPE gives if the key stands ``distances [T, S]`` before the query, float64."""
    inv_freq = method.frequencies(16)
    phase = distances[..., None] * inv_freq
    q, k = (np.asarray(x, np.float64)[0] for x in (q, k))
    k = np.repeat(k, 2, axis=1)
    first, second = (np.split(x, 2, axis=-1) for x in (q, k))
    along = np.einsum("tnf,snf->ntsf", first[0], second[0])
    along += np.einsum("tnf,snf->ntsf", first[1], second[1])
    across = np.einsum("tnf,snf->ntsf", first[0], second[1])
    across -= np.einsum("tnf,snf->ntsf", first[1], second[0])
    turned = along * np.cos(phase)[None] + across * np.sin(phase)[None]
    return turned.sum(-1) * 16**-0.5 * method.attention_factor(16) ** 2


def self_extended(i, j, window, group):
    return i // group + window - window // group - j // group


REMAPPED = {
    "self-extend": (partial(SelfExtend, window=7, group=3), lambda i, j: self_extended(i, j, 7, 3)),
    "rerope": (partial(ReRoPE, window=7), lambda i, j: 0 * (i - j) + 7),
    "leaky": (partial(ReRoPE, window=7, leak=3), lambda i, j: 7 + (i - j - 7) / 3),
}


@pytest.mark.parametrize("name", REMAPPED)
@pytest.mark.parametrize("start", [0, 1_000_000])
def test_logits_are_those_of_the_distances_that_are_promised(name, start):
    """Also from a million tokens on, and under a scaling with a temperature."""
    rope = RoPE(theta=100.0, scaling=(YaRN(4.0, 40),))
    build, far = REMAPPED[name]
    (layer,) = build(rope).layers()
    q, k = draw(30)
    ours = np.asarray(logits(layer, q, k, jnp.arange(start, start + 30)[None]))[0]
    i, j = np.arange(start, start + 30)[:, None], np.arange(start, start + 30)[None]
    true = logits_at_distances(rope, q, k, np.where(i - j >= 7, far(i, j), i - j))
    seen = np.tril(np.ones((30, 30), bool))
    np.testing.assert_allclose(ours[:, seen], true[:, seen], atol=2e-5 if start == 0 else 5e-4)
    plain = logits_at_distances(rope, q, k, i - j)
    assert np.abs(ours - plain)[:, i - j >= 10].max() > 0.5, "no far key has moved"


@pytest.mark.fast("rope1")
@pytest.mark.parametrize("rope", [RoPE(interleaved=True), RoPE(partial_rotary_factor=0.5)])
def test_within_the_window_nothing_changes_for_any_rotation(rope):
    q, k = draw(30)
    positions = jnp.arange(30)[None]
    turned_q, turned_k = rope.rotate({}, rope.tables({}, positions, 16), q, k)
    for method in (SelfExtend(rope, 8, 4), ReRoPE(rope, 8), ReRoPE(rope, 8, leak=2)):
        (layer,) = method.layers()
        both = layer.method.rotate({}, layer.method.tables({}, positions, 16), q, k)
        for ours, plain in zip(both, (turned_q, turned_k), strict=True):
            assert ours.shape[-1] == 32
            np.testing.assert_array_equal(ours[..., :16], plain)
    # A group of one token: the far version has true distances as well.
    (layer,) = SelfExtend(rope, 8, 1).layers()
    far_q, far_k = layer.method.rotate({}, layer.method.tables({}, positions, 16), q, k)
    np.testing.assert_allclose(far_q[..., 16:], turned_q, atol=1e-6)
    np.testing.assert_allclose(far_k[..., 16:], turned_k, atol=1e-6)


def test_no_distance_passes_the_trained_one():
    """Up to (L - w) g + w tokens, at every pair of positions."""
    trained, window, group = 64, 24, 5
    (layer,) = SelfExtend(ROPE, window, group).layers()
    length = (trained - window) * group + window
    positions = jnp.arange(length)
    q_positions, k_positions = layer.method.far_positions(positions)
    distances = np.asarray(q_positions[:, None] - k_positions[None])
    is_far = np.tril(np.ones((length, length), bool), -window)
    assert distances[is_far].max() <= trained and distances[is_far].min() >= window - group
    # One token more than a group further, and it would.
    q_positions, _ = layer.method.far_positions(jnp.arange(length + 2 * group))
    assert int(q_positions[-1]) > trained


def test_fope_keeps_its_coefficients_and_sees_trained_positions_alone():
    fope = FoPE(40, heads="query")
    (layer,) = SelfExtend(fope, 8, 4).layers()
    variables = fope.init(jax.random.key(0), SHAPE)
    assert SelfExtend(fope, 8, 4).init(jax.random.key(0), SHAPE).layer_constants.keys() == (
        variables.layer_constants.keys()
    )
    variables = variables.at_layer(0)
    q, k = draw(24)
    at = jnp.arange(100, 124)[None]
    q2, k2 = layer.method.rotate(variables, layer.method.tables(variables, at, 16), q, k)
    far = [at // 4 + 8 - 2, at // 4]
    q1 = fope.rotate(variables, fope.tables(variables, far[0], 16), q, k)[0]
    k1 = fope.rotate(variables, fope.tables(variables, far[1], 16), q, k)[1]
    np.testing.assert_allclose(q2[..., 16:], q1, atol=1e-6)
    np.testing.assert_allclose(k2[..., 16:], k1, atol=1e-6)


def test_other_layers_of_a_pattern_stay_as_they_are():
    """Without rotation, or without a key that is far: as they were, without a second version."""
    pattern = ByLayer(
        (RoPE(), NoPE(), SlidingWindow(RoPE(), 8), LocalChunks(RoPE(), 9), SlidingWindow(RoPE(), 9))
    )
    layers = SelfExtend(pattern, window=8, group=4).layers()
    assert [layer.far_from for layer in layers] == [8, None, None, 8, 8]
    assert [layer.window for layer in layers] == [None, None, 8, None, 9]
    assert layers[1:3] == pattern.layers()[1:3]
    assert [layer.scope for layer in layers] == [layer.scope for layer in pattern.layers()]
    assert ReRoPE(ByShare((RoPE(), NoPE()), (0.5, 0.5)), 8).layers()[0].far_from == 8


def test_what_it_leaves_to_the_inner_method():
    method = SelfExtend(XPos(), window=8, group=2)
    assert method.limits == XPos().limits._replace(needs_causal_mask=True)
    np.testing.assert_array_equal(method.frequencies(16), XPos().frequencies(16))
    (layer,) = method.layers()
    assert layer.method.limits == XPos().limits
    np.testing.assert_array_equal(layer.method.frequencies(16), XPos().frequencies(16))
    (layer,) = SelfExtend(FoPE(40), 8, 2).layers()
    assert layer.method.variable_axes("cos_coef") == ("heads",)
    for each in (method, ReRoPE(RoPE(), 8, leak=2)):
        assert from_spec(to_spec(each)) == each


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfExtend(RoPE(), 0, 4), "window=0: tokens with distances as trained must be 1"),
        (lambda: SelfExtend(RoPE(), 8.5, 4), "window=8.5: .*a whole number"),
        (lambda: SelfExtend(RoPE(), 8, 0), "group=0: tokens that share a position must be 1"),
        (lambda: SelfExtend("rope", 8, 4), "inner='rope': expected a rotation such as RoPE"),
        (lambda: SelfExtend(ALiBi(), 8, 4), "inner holds ALiBi: it has the hook bias"),
        (lambda: ReRoPE(Sinusoidal(), 8), "inner holds Sinusoidal: it has the hook embed"),
        (lambda: ReRoPE(NoPE(), 8), "inner=NoPE: no layer of it rotates keys 8 tokens back"),
        (lambda: ReRoPE(SlidingWindow(RoPE(), 8), 8), "no layer of it rotates keys 8 tokens back"),
        (
            lambda: SelfExtend(RoPE(scaling=(DynamicNTK(4.0, 8),)), 8, 4),
            "RoPE whose frequencies follow the length .* give the scaling a length",
        ),
        (lambda: ReRoPE(SelfExtend(RoPE(), 8, 4), 16), "other distances from 8 tokens on"),
        (lambda: ReRoPE(RoPE(), 8, leak=1), "leak=1: the divisor .* must be 2 or more"),
        (lambda: ReRoPE(RoPE(), 8, leak=2.5), "leak=2.5: .*a whole number"),
        (lambda: ReRoPE(FoPE(40), 8, leak=4), "leak=4, inner holds FoPE: only RoPE has angles"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
