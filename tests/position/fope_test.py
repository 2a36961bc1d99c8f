"""FoPE: its limits, its knobs one by one, and what the equations say at single positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    ALiBi,
    FoPE,
    ModelShape,
    NoPE,
    RoPE,
    fourier_coefficients,
    fourier_tables,
    inverse_frequencies,
)
from fope_jax.position.base import bias_of_heads
from fope_jax.position.fourier import coefficient_std, own_identity, step_identity

SHAPE = ModelShape(d_model=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32)
POSITIONS = jnp.arange(300, dtype=jnp.int32)[None]


def rotated(method, seed=0, shape=SHAPE):
    method.check(shape)
    owned = method.init(jax.random.key(seed), shape)
    layer = {n: v[0] for n, v in {**owned.layer_params, **owned.layer_constants}.items()}
    random = np.random.default_rng(0)
    q, k = (
        jnp.asarray(random.normal(size=(1, 300, heads, shape.head_dim)), jnp.float32)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    model = {**owned.model_params, **owned.model_constants}
    return method.rotate(layer, method.tables(model, POSITIONS, shape.head_dim), q, k)


def assert_same(one, other):
    for a, b in zip(rotated(one), rotated(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_identity_coefficients_and_no_floor_are_rope():
    assert_same(FoPE(64, clip=False, sigma=0.0, outputs="surviving"), RoPE())
    assert_same(FoPE(64, clip=False, sigma=0.0, drop_zero=False), RoPE())
    assert_same(FoPE.equations(10**9, sigma=0.0), RoPE())


def test_no_noise_with_clipping_is_clipped_rope():
    clipped = FoPE(64, series=False)
    assert_same(FoPE.equations(64, sigma=0.0), clipped)
    assert_same(FoPE(64, sigma=0.0, zero_sine=0.0), clipped)
    assert_same(FoPE(64, sigma=0.0, drop_zero=False), clipped)


def test_alibi_with_zero_slopes_is_nope():
    alibi = ALiBi(slopes=(0.0,) * 4)
    assert not np.any(
        bias_of_heads(alibi, {"slopes": np.zeros(4, np.float32)}, POSITIONS, POSITIONS)
    )
    assert NoPE().tables({}, POSITIONS, 32) is None


def test_zero_frequency_pairs_have_the_stated_phase():
    """Sine 1 turns q and k by 45 degrees and scales by sqrt 2: twice the plain product."""
    for zero_sine, factor in ((1.0, 2.0), (0.0, 1.0)):
        q, k = rotated(FoPE(64, zero_sine=zero_sine))
        random = np.random.default_rng(0)
        x, y = (random.normal(size=(1, 300, 4, 32)).astype(np.float32) for _ in range(2))
        d = FoPE(64).num_outputs(32)
        zero = np.r_[d:16, 16 + d : 32]
        plain = np.einsum("bthi,bthi->bth", x[..., zero], y[..., zero])
        ours = np.einsum("bthi,bthi->bth", q[..., zero], k[..., zero])
        np.testing.assert_allclose(ours, factor * plain, atol=1e-4)


def test_tables_are_the_series_term_by_term():
    """One value written out with math alone, at a position past training."""
    inv_freq = np.array([1.0, 0.3, 0.07])
    cos_coef, sin_coef = fourier_coefficients(jax.random.key(2), 2, 3, 2, sigma=0.7)
    cos, sin = fourier_tables(
        jnp.array([[0, 731]]), inv_freq, cos_coef, sin_coef, head_dim=8, zero_sine=0.25
    )
    for head in range(2):
        for m in range(2):
            expected = sum(
                float(sin_coef[head, w, m]) * np.sin(731 * inv_freq[w]) for w in range(3)
            )
            np.testing.assert_allclose(sin[0, 1, head, m], expected, atol=1e-4)
            np.testing.assert_allclose(cos[0, 0, head, m], np.sum(cos_coef[head, :, m]), atol=1e-6)
    np.testing.assert_array_equal(cos[..., 2:], 1.0)
    np.testing.assert_array_equal(sin[..., 2:], 0.25)


@pytest.mark.parametrize(
    ("convention", "heads", "expected"),
    [
        ("normal", 8, 0.3),
        ("xavier", 8, 0.3 * np.sqrt(2 / (40 * 20 + 8 * 20))),
        ("xavier", None, 0.3 * np.sqrt(2 / (40 + 20))),
    ],
)
def test_sigma_conventions(convention, heads, expected):
    cos_coef, sin_coef = fourier_coefficients(
        jax.random.key(5), heads, 40, 20, 0.3, convention=convention
    )
    np.testing.assert_allclose(coefficient_std(0.3, heads, 40, 20, convention), expected, rtol=1e-6)
    identity = np.broadcast_to(step_identity(40, 20), cos_coef.shape)
    noise = [np.ravel(np.asarray(coef) - identity) for coef in (cos_coef, sin_coef)]
    for part in noise:
        scatter = expected / np.sqrt(part.size)
        assert abs(part.mean()) < 5 * scatter
        assert abs(part.std() - expected) < 5 * scatter
    assert abs(np.corrcoef(*noise)[0, 1]) < 5 / np.sqrt(noise[0].size)  # drawn apart


def constants(method, shape=SHAPE):
    return method.init(jax.random.key(0), shape).layer_constants


@pytest.mark.slow
def test_knobs_shape_the_coefficients():
    grouped = ModelShape(d_model=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    survivors = 5  # RoPE's frequencies at head_dim 32 above 2 pi / 64
    assert constants(FoPE(64), grouped)["cos_coef"].shape == (2, 2, 5, 5)
    assert constants(FoPE(64, heads="query"), grouped)["cos_coef"].shape == (2, 4, 5, 5)
    assert constants(FoPE(64, heads="shared"), grouped)["cos_coef"].shape == (2, 5, 5)
    assert constants(FoPE(64, drop_zero=False))["cos_coef"].shape == (2, 4, 16, 16)
    assert constants(FoPE(4096))["cos_coef"].shape == (2, 4, 12, 8)  # at most H/4 outputs
    assert constants(FoPE(4096, outputs="surviving"))["cos_coef"].shape == (2, 4, 12, 12)
    assert constants(FoPE.equations(64))["cos_coef"].shape == (2, 4, 32, survivors)
    assert constants(FoPE.equations(64, num_frequencies=50))["cos_coef"].shape == (2, 4, 50, 5)
    assert set(constants(FoPE(64, separate_sine=False))) == {"cos_coef"}
    assert not constants(FoPE(64, series=False))


def test_without_a_floor_no_more_pairs_get_a_series_than_with_one():
    """The released code: min(D, H/4) of them, or all H/2 where zeros are kept."""
    for made in (FoPE(64, clip=False), FoPE.official(64, clip=False)):
        assert constants(made)["cos_coef"].shape == (2, 4, 16, 8)
    assert constants(dataclasses.replace(FoPE(64), clip=False))["cos_coef"].shape[-1] == 8
    assert constants(FoPE(64, clip=False, drop_zero=False))["cos_coef"].shape[-1] == 16
    assert constants(FoPE.equations(64, clip=False))["cos_coef"].shape == (2, 4, 32, 16)


def test_configurations_that_hold_outputs_quarter_mean_what_they_meant():
    """Every pair got a series without the floor; with it the value was ``official``'s."""
    assert constants(FoPE(64, clip=False, outputs="quarter"))["cos_coef"].shape[-1] == 16
    assert_same(FoPE(64, clip=False, sigma=0.0, outputs="quarter"), RoPE())
    for knobs in ({}, {"drop_zero": False}, {"clip": False, "drop_zero": False}):
        assert FoPE(64, outputs="quarter", **knobs) == FoPE(64, **knobs)
    assert FoPE(64, clip=False, outputs="quarter") != FoPE(64, clip=False)


def test_layers_share_on_request_only():
    shared, apart = constants(FoPE(64, share_layers=True)), constants(FoPE(64))
    np.testing.assert_array_equal(shared["cos_coef"][0], shared["cos_coef"][1])
    assert not np.array_equal(apart["cos_coef"][0], apart["cos_coef"][1])


def test_learnable_coefficients_are_parameters():
    owned = FoPE(64, learnable=True).init(jax.random.key(0), SHAPE)
    assert set(owned.layer_params) == {"cos_coef", "sin_coef"} and not owned.layer_constants
    np.testing.assert_array_equal(owned.layer_params["cos_coef"], constants(FoPE(64))["cos_coef"])


def test_extra_frequencies_are_drawn_from_zero_to_pi_and_kept():
    method = FoPE.equations(64, num_frequencies=2000)
    extra = method.init(jax.random.key(0), SHAPE).model_constants["extra_frequencies"]
    assert extra.shape == (1995,)
    assert extra.min() >= 0 and extra.max() <= np.pi
    assert abs(float(extra.mean()) - np.pi / 2) < 5 * np.pi / np.sqrt(12 * 1995)


def test_identity_placement():
    np.testing.assert_array_equal(step_identity(4, 4), np.eye(4))
    uneven = step_identity(18, 16)  # the paper's 60M model at length 1024
    assert uneven.sum() == 9 and uneven[0, 0] == uneven[2, 1] == uneven[16, 8] == 1
    fine, own = inverse_frequencies(64), inverse_frequencies(32)
    placed = own_identity(fine, own)
    np.testing.assert_allclose(fine @ placed, own, rtol=1e-6)
    assert (placed.sum(axis=0) == 1).all()


def test_normalised_columns_start_at_cosine_one():
    method = FoPE(64, normalise=True, zero_sine=0.0)
    q, _ = rotated(method)
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 300, 4, 32)).astype(np.float32)
    np.testing.assert_allclose(q[:, 0], x[:, 0], atol=1e-5)


def test_evaluating_longer_does_not_move_the_floor():
    """The knob is the training length; nothing of the sequence at hand enters."""
    method = FoPE(64)
    one = method.tables({}, jnp.arange(64, dtype=jnp.int32)[None], 32)
    longer = method.tables({}, POSITIONS, 32)
    for a, b in zip(one, longer, strict=True):
        np.testing.assert_array_equal(a, b[:, :64])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rope", "grid"])
def test_zeros_that_stay_in_the_mix_have_a_term_of_their_own(source):
    """Each output at its own frequency and no noise: the clipped RoPE, whatever the basis.

    A frequency just under the floor is nearer to the slowest that survives than to 0, and stands
    still all the same. The grid of twice the size holds RoPE's frequencies.
    """
    size = 32 if source == "grid" else None
    knobs = {"frequencies_from": source, "num_frequencies": size, "drop_zero": False}
    mixed = FoPE(512, sigma=0.0, identity="own", **knobs)
    clipped = FoPE(512, series=False)
    shape = ModelShape(64, 1, 2, 2, 32)
    mixed.check(shape)
    layer = {k: v[0] for k, v in mixed.init(jax.random.key(0), shape).layer_constants.items()}
    positions = jnp.arange(700)[None]
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 700, 2, 32)), jnp.float32)
    ours = mixed.rotate(layer, mixed.tables({}, positions, 32), q, q)
    theirs = clipped.rotate({}, clipped.tables({}, positions, 32), q, q)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
