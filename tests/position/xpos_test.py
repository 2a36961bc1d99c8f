"""xPos: parity with rotary-embedding-torch, its decay, and where float32 ends."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import RoPE, XPos, xpos_decay

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "peers_rope.npz")


def scores(method, q, k, positions):
    q, k = method.rotate({}, method.tables({}, positions, q.shape[-1]), q, k)
    return jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")


@pytest.mark.parametrize("start", [0, 20_000])
def test_scores_are_those_of_rotary_embedding_torch(start):
    """They count from the middle of the sequence: scores depend on distances alone."""
    q, k = (jnp.swapaxes(GOLDENS[f"xpos/{name}"], 1, 2) for name in "qk")
    positions = start + jnp.arange(q.shape[1])[None]
    ours = scores(XPos(interleaved=True), q, k, positions)
    theirs = GOLDENS["xpos/scores"]
    tolerance = 1e-5 if start == 0 else 2e-4  # float32 amplitudes of e**49 carry 6e-6 relative
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_amplitude_is_the_decay_to_the_distance():
    """One pair of dimensions, q = k = (1, 0): zeta ** (d / B) cos(w d)."""
    method = XPos(scale_base=64.0)
    x = jnp.zeros((1, 50, 1, 8)).at[..., 1].set(1.0)
    ours = scores(method, x, x, jnp.arange(50)[None])[0, 0]
    distance = np.arange(50)[:, None] - np.arange(50)
    decay, frequency = xpos_decay(8)[1], method.frequencies(8)[1]
    np.testing.assert_allclose(
        ours, decay ** (distance / 64) * np.cos(frequency * distance), atol=2e-6
    )


def test_no_decay_is_rope():
    """gamma to infinity: zeta = 1."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 30, 2, 16)), jnp.float32)
    positions = jnp.arange(30)[None]
    ours, rope = (scores(m, q, q, positions) for m in (XPos(gamma=1e9), RoPE()))
    np.testing.assert_allclose(ours, rope, atol=1e-5)


def test_the_limit_is_where_float32_ends():
    method = XPos()
    limit = method.limits.max_length
    assert limit == 26_156
    inside = method.tables({}, jnp.array([[0, limit - 1]]), 32)[2]
    assert np.isfinite(inside).all() and np.isfinite(1 / inside).all()
    beyond = method.tables({}, jnp.array([[limit, -limit]]), 32)[2]
    assert np.isnan(beyond).all()
    assert XPos(scale_base=5120.0).limits.max_length == pytest.approx(10 * limit, abs=10)


@pytest.mark.parametrize("gamma", [0.4, 1.0, 1e9, 1e17, 3e38])
def test_the_limit_is_where_the_fastest_decay_leaves_float32(gamma):
    """Also where (1 + gamma) / gamma is 1 in float64: float32 then holds all positions."""
    longest = XPos(gamma=gamma, scale_base=512.0).limits.max_length
    assert longest == (26_156 if gamma == 0.4 else 47_274 if gamma == 1.0 else 2**31 - 1)


def test_float16_ends_earlier():
    """At the defaults keys would grow beyond float16 at 4,532 tokens, by e**11.1."""
    method = XPos()

    def turned(positions, dtype=jnp.float16):
        x = jnp.ones((1, len(positions), 1, 8), dtype)
        return method.rotate({}, method.tables({}, np.array([positions]), 8), x, x)

    for q_or_k, right in zip(
        turned([0, 2000, 3269]), turned([0, 2000, 3269], jnp.float32), strict=True
    ):
        np.testing.assert_allclose(q_or_k, right, rtol=2e-2, atol=1e-6)
    assert all(np.isnan(x).all() for x in turned([3270, 6000]))
    assert all(np.isfinite(x).all() for x in turned([3270, 6000], jnp.bfloat16))
    with pytest.raises(
        ValueError, match="6000 tokens in float16, which holds its factors for 3269"
    ):
        turned(range(6000))
