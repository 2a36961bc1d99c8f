"""Phases stay accurate where a float32 product of position and frequency has lost them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.position import angles, inverse_frequencies

HEAD_DIMS = (32, 64, 128)
LONG = (131_072, 131_071, 524_287, 1_000_003, 1_048_576)


def errors(phase, exact):
    phase = np.asarray(phase, np.float64)
    return max(
        np.abs(np.cos(phase) - np.cos(exact)).max(), np.abs(np.sin(phase) - np.sin(exact)).max()
    )


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long_positions(head_dim, theta, traced):
    inv_freq = inverse_frequencies(head_dim, theta)
    positions = np.array([LONG], np.int32)
    if traced:  # what arrives as a float32 array is exact at its float32 value
        inv_freq = inv_freq.astype(np.float32)
        phase = jax.jit(angles)(positions, inv_freq)
    else:
        phase = jax.jit(lambda p: angles(p, inv_freq))(positions)
    exact = positions[..., None].astype(np.float64) * inv_freq.astype(np.float64)
    assert phase.dtype == jnp.float32
    assert errors(phase, exact) < 1e-5


def test_the_plain_product_fails():
    """The reason for the fixed-point product; if this starts to pass, delete the machinery."""
    inv_freq = inverse_frequencies(64)
    product = jnp.float32(1_048_575) * jnp.asarray(inv_freq, jnp.float32)
    assert errors(product, 1_048_575 * inv_freq) > 1e-2


def test_short_positions_are_the_plain_product():
    inv_freq = inverse_frequencies(64)
    positions = np.arange(-1023, 1024, dtype=np.int32)[None]
    product = positions[..., None].astype(np.float32) * inv_freq.astype(np.float32)
    np.testing.assert_array_equal(angles(positions, inv_freq), product)
    assert errors(product, positions[..., None] * inv_freq) < 5e-5


@pytest.mark.parametrize("traced", [False, True], ids=["constant", "traced"])
def test_beyond_short_positions_every_phase_is_exact(traced):
    """All positions from 1,024 to 20,000: the remainder modulo a turn, to float32 rounding."""
    inv_freq = inverse_frequencies(64).astype(np.float32)
    positions = np.arange(1024, 20_000, dtype=np.int32)[None]
    exact = positions[..., None] * inv_freq.astype(np.float64)
    phase = angles(positions, jnp.asarray(inv_freq) if traced else inv_freq)
    assert errors(phase, exact) < 1e-6
    assert np.abs(phase).max() < 3.142


@settings(deadline=None)  # the first example compiles
@given(
    frequency=st.floats(-100, 100, width=32),
    position=st.integers(-(2**24), 2**24).filter(lambda p: abs(p) >= 1024),
)
def test_any_frequency_and_position(frequency, position):
    inv_freq = np.array([frequency], np.float32)
    positions = np.array([[position]], np.int32)
    exact = np.float64(position) * np.float64(inv_freq)
    constant = angles(positions, inv_freq)
    traced = angles(positions, jnp.asarray(inv_freq))
    # 2**24 tokens of a frequency held to 2**-53 turns, and float32 phases of half a turn.
    assert errors(constant, exact) < 2e-6
    assert errors(traced, exact) < 2e-4


def test_gradient_of_a_frequency_is_the_position():
    positions = jnp.array([[0, 3, 131_072]], jnp.int32)
    gradient = jax.jacobian(lambda f: angles(positions, f))(jnp.array([0.5, 0.01], jnp.float32))
    expected = np.einsum("t,fg->tfg", [0, 3, 131_072], np.eye(2))[None]
    np.testing.assert_array_equal(gradient, expected)


def test_fractions_of_a_token_have_their_phase():
    """To half a million tokens in steps of 1/32, where a float32 product is off by 0.005."""
    positions = np.array([[0.25, 1.5, 1023.75, 1024.03125, 65_537.5, 524_287.96875]], np.float32)
    positions = np.concatenate([positions, -positions], axis=1)
    inv_freq = inverse_frequencies(24)
    exact = positions.astype(np.float64)[..., None] * inv_freq
    for known in (inv_freq, jnp.asarray(inv_freq, jnp.float32)):
        rate = np.asarray(known, np.float64)
        phase = jax.jit(lambda p, f=known: angles(p, f))(positions)
        assert errors(phase, positions.astype(np.float64)[..., None] * rate) < 1e-4
    plain = np.float32(positions)[..., None] * np.float32(inv_freq)
    assert errors(plain, exact) > 4e-3
    whole = np.array([[0, 7, 1024, 131_073]])
    np.testing.assert_array_equal(
        angles(whole.astype(np.float32), inv_freq), angles(whole, inv_freq)
    )


def test_gradient_of_a_fraction_is_the_frequency():
    inv_freq = np.array([0.5, 0.01])
    positions = jnp.array([3.25, 131_072.5], jnp.float32)
    for known in (inv_freq, jnp.asarray(inv_freq, jnp.float32)):
        gradient = jax.jacobian(lambda p, f=known: angles(p, f))(positions)
        expected = np.einsum("f,tu->tfu", inv_freq, np.eye(2))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_positions_must_count_tokens():
    for dtype in (jnp.float16, jnp.bfloat16):
        with pytest.raises(
            TypeError, match="float16: they count tokens, pass integers .or float32"
        ):
            angles(jnp.zeros((1, 2), dtype), inverse_frequencies(8))
    for far in (2.0**25, -np.inf, np.nan):
        with pytest.raises(ValueError, match="in float32 has no fraction: pass integers, or stay"):
            angles(jnp.array([[0.0, far]]), inverse_frequencies(8))
    with pytest.raises(ValueError, match=r"inv_freq has shape \(1, 4\)"):
        angles(jnp.zeros((1, 2), jnp.int32), inverse_frequencies(8)[None])
