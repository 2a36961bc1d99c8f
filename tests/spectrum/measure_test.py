"""Measures of a layer on captures that are made, not taken from a model: each has a known value."""

import jax
import numpy as np
import pytest

from fope_jax.position import FoPE, ModelShape, RoPE, XPos
from fope_jax.position.xpos import xpos_decay
from fope_jax.spectrum.capture import WindowCapture
from fope_jax.spectrum.measure import PAIRS, SEED, measure_layers
from fope_jax.spectrum.series import series_of, trained_pairs

LENGTH, HEADS, HEAD_DIM = 64, 4, 8


def window(rng, **fields):
    """One layer of white noise; ``fields`` such as ``profile`` without the layer's axis."""
    noise = {
        "x": (LENGTH, 12),
        **dict.fromkeys(("q", "k", "turned_q", "turned_k"), (LENGTH, HEADS, HEAD_DIM)),
        **dict.fromkeys(("profile", "entropy", "distance"), (HEADS, LENGTH)),
        "square": (HEADS,),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in noise.items()} | fields
    return WindowCapture(**{name: np.asarray(x)[None] for name, x in arrays.items()})


def measure(windows, series=None, training_length=LENGTH, last=16):
    """The spectrum of the only layer."""
    (layer,) = measure_layers(LENGTH, windows, [series], training_length=training_length, last=last)
    return layer


def series(method, num_kv_heads=HEADS):
    shape = ModelShape(32, HEADS, num_kv_heads, 1, head_dim=HEAD_DIM)
    variables = method.init(jax.random.key(0), shape)
    constants = {name: np.asarray(x)[0] for name, x in variables.layer_constants.items()}
    return series_of(method, constants, shape)


def test_profiles_of_noise_alone_are_all_noise():
    rng = np.random.default_rng(0)
    share = measure([window(rng) for _ in range(48)]).noise_share
    assert share.shape == (HEADS,)
    assert share.mean() == pytest.approx(1, abs=0.25)


def test_twice_the_windows_leave_half_of_the_noise():
    rng = np.random.default_rng(1)
    signal = 3 * np.cos(0.4 * np.arange(LENGTH))
    noises = rng.standard_normal((64, HEADS, LENGTH))
    windows = [window(rng, profile=signal + noise) for noise in noises]
    few, many = measure(windows[:32]).noise_share, measure(windows).noise_share
    assert few.mean() / many.mean() == pytest.approx(2, rel=0.15)
    assert np.isnan(measure(windows[:1]).noise_share).all()


def test_hidden_states_that_are_alike_in_all_windows_are_locked_to_the_position():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((LENGTH, 12))
    assert measure([window(rng, x=x) for _ in range(3)]).hidden_locked == pytest.approx(1)
    assert abs(measure([window(rng) for _ in range(3)]).hidden_locked) < 0.05
    half = [window(rng, x=x + rng.standard_normal(x.shape)) for _ in range(3)]
    assert measure(half).hidden_locked == pytest.approx(0.5, abs=0.08)


def test_entropy_and_distance_are_means_over_the_last_queries():
    rng = np.random.default_rng(3)
    rising = np.arange(LENGTH) * np.ones((HEADS, 1))
    found = measure([window(rng, entropy=rising, distance=2 * rising)], last=4)
    np.testing.assert_allclose(found.entropy, LENGTH - 2.5)
    np.testing.assert_allclose(found.distance, 2 * (LENGTH - 2.5))


def test_the_null_of_undertrained_energy_counts_pairs_of_dimensions():
    """FoPE has as many frequencies as it mixes, and a pair of each of the head's dimensions."""
    of_layer = series(FoPE(4 * LENGTH, theta=100.0))
    found = measure([window(np.random.default_rng(4))], of_layer, training_length=LENGTH // 2)
    undertrained = [pair.undertrained for pair in trained_pairs(of_layer, LENGTH // 2)]
    assert found.undertrained_null == np.mean(undertrained)
    slow = np.abs(of_layer.frequencies) < 2 * np.pi / (LENGTH // 2)
    assert 0 < found.undertrained_null != slow.mean()  # what counting frequencies would give


def test_grouped_heads_are_heads_with_the_same_keys():
    rng = np.random.default_rng(5)
    k = rng.standard_normal((LENGTH, 2, HEAD_DIM)) * [[[1.0], [9.0]]]
    of_layer = series(RoPE(theta=1000.0))
    grouped = window(rng, k=k, turned_k=k)
    whole = WindowCapture(*grouped)._replace(k=np.repeat(grouped.k, 2, axis=2))
    few, many = (measure([one], of_layer).undertrained_energy for one in (grouped, whole))
    np.testing.assert_allclose(few, many, rtol=1e-12)
    assert np.ptp(few) > 0.01


def test_the_energy_of_xpos_decays_with_distance():
    """With the same q and k everywhere |G_f| is |q_f k_f| zeta_f ** (distance / B)."""
    method = XPos(theta=1000.0, scale_base=20.0)
    rng = np.random.default_rng(6)
    q, k = (np.broadcast_to(rng.standard_normal((HEADS, HEAD_DIM)), (LENGTH, HEADS, HEAD_DIM)),) * 2
    of_layer = series(method)
    found = measure([window(rng, q=q, k=k)], of_layer).undertrained_energy
    drawn = np.sort(np.random.default_rng(SEED).integers(0, LENGTH, (PAIRS, 2)), axis=1)
    distance = drawn[:, 1] - drawn[:, 0]
    decay = (xpos_decay(HEAD_DIM) ** (2 * distance[:, None] / 20.0)).mean(axis=0)
    halves = q[0, :, : HEAD_DIM // 2] ** 2 + q[0, :, HEAD_DIM // 2 :] ** 2
    energy = halves**2 * decay
    slow = 1000.0 ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM) < 2 * np.pi / LENGTH
    np.testing.assert_allclose(found, energy[:, slow].sum(1) / energy.sum(1), rtol=1e-9)
