"""Each assertion for users passes on what keeps its property and fails on what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax import testing
from fope_jax.position import angles, inverse_frequencies, rotate

INV_FREQ = inverse_frequencies(8, theta=50.0)
Q, K, V = np.random.default_rng(0).normal(size=(3, 2, 12, 3, 8)).astype(np.float32)
POSITIONS = np.arange(12, dtype=np.int32)[None].repeat(2, axis=0)


def turn(x, positions, scale=1.0):
    phase = angles(positions, INV_FREQ)
    return rotate(x, scale * jnp.cos(phase), jnp.sin(phase))


def attention(x, positions, segments=None, is_causal=True, sees_all=False):
    """RoPE attention of x = (q, k, v)."""
    q, k, v = x
    logits = jnp.einsum("btnh,bsnh->bnts", turn(q, positions), turn(k, positions))
    index = jnp.arange(q.shape[1])
    seen = jnp.ones((q.shape[1],) * 2, bool)
    if is_causal:
        seen = index[:, None] >= index
    if segments is not None and not sees_all:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def test_shift():
    def logits(positions, scale=1.0):
        q, k = (turn(x, positions, scale) for x in (Q, K))
        return jnp.einsum("btnh,bsnh->bnts", q, k)

    testing.assert_shift_invariant(logits, POSITIONS)
    with pytest.raises(AssertionError, match=r"positions \+ 150 differ .* by \d"):
        testing.assert_shift_invariant(lambda p: logits(p, 1.1), POSITIONS)


def test_causality():
    testing.assert_causal(lambda x: attention(x, POSITIONS), (Q, K, V))
    with pytest.raises(AssertionError, match="depend on tokens from 1 on"):
        testing.assert_causal(lambda x: attention(x, POSITIONS, is_causal=False), (Q, K, V))
    with pytest.raises(AssertionError, match="is x read"):
        testing.assert_causal(lambda x: np.zeros((2, 12)), (Q, K, V))


def test_causality_of_tokens():
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    testing.assert_causal(lambda x: np.cumsum(x, axis=1), tokens)
    with pytest.raises(AssertionError, match="depend on"):
        testing.assert_causal(lambda x: np.cumsum(x[:, ::-1], axis=1)[:, ::-1], tokens)


def test_prefix():
    testing.assert_prefix_unchanged(attention, (Q, K, V), POSITIONS, 5)

    def logits(x, positions):
        q, k = (turn(x, positions) for x in x)
        return jnp.einsum("btnh,bsnh->btns", q, k)

    testing.assert_prefix_unchanged(logits, (Q, K), POSITIONS, 5, key_axis=3)
    with pytest.raises(AssertionError, match="a prefix of 5 tokens"):
        testing.assert_prefix_unchanged(
            lambda x, p: attention(x, p) * x[0].shape[1], (Q, K, V), POSITIONS, 5
        )


def test_packed():
    testing.assert_packed_equals_separate(attention, (Q, K, V), (5, 3))
    with pytest.raises(AssertionError, match=r"document 2 \(3 tokens\)"):
        testing.assert_packed_equals_separate(
            lambda *x: attention(*x, sees_all=True), (Q, K, V), (5, 3)
        )
    with pytest.raises(ValueError, match=r"lengths \(5, 8\)"):
        testing.assert_packed_equals_separate(attention, (Q, K, V), (5, 8))


@pytest.mark.parametrize("offset", [0, 1])
def test_cached(offset):
    """Also a cache that gives keys the positions of others."""

    @jax.jit
    def step(cache, x, t):
        cache = [a.at[:, t].set(b[:, 0]) for a, b in zip(cache, x, strict=True)]
        y = attention(cache, jnp.asarray(POSITIONS * (1 + offset)))
        return jax.lax.dynamic_slice_in_dim(y, t, 1, axis=1), cache

    empty = [jnp.zeros_like(x) for x in (Q, K, V)]
    check = [lambda x: attention(x, POSITIONS), step, (Q, K, V), empty]
    if offset:
        with pytest.raises(AssertionError, match="token 1 decoded"):
            testing.assert_cached_equals_full(*check)
    else:
        testing.assert_cached_equals_full(*check)


def test_norm_and_phases():
    testing.assert_norm_kept(lambda x: turn(x, POSITIONS), Q)
    with pytest.raises(AssertionError, match="the norm changes"):
        testing.assert_norm_kept(lambda x: turn(x, POSITIONS, 1.01), Q)

    def tables(positions, inv_freq=INV_FREQ):
        phase = angles(positions, inv_freq)
        return jnp.cos(phase), jnp.sin(phase)

    testing.assert_phases_accurate(tables, INV_FREQ)
    with pytest.raises(AssertionError, match="to position 1,048,575"):
        testing.assert_phases_accurate(lambda p: tables(p, INV_FREQ * (1 + 1e-8)), INV_FREQ)


def test_gradients():
    x = np.float32([[1.0, 2.0], [3.0, 0.5]])
    testing.assert_gradients(lambda x, y: {"a": jnp.sin(x) * y["b"]}, x, {"b": x + 1})

    @jax.custom_jvp
    def wrong(x):
        return jnp.sin(x)

    wrong.defjvp(lambda primals, tangents: (wrong(*primals), -jnp.cos(primals[0]) * tangents[0]))
    with pytest.raises(AssertionError, match="central difference"):
        testing.assert_gradients(wrong, x)
    with pytest.raises(AssertionError):
        testing.assert_gradients(jnp.sqrt, x * 0)


def test_not_finite_is_no_agreement():
    with pytest.raises(AssertionError):
        testing.assert_shift_invariant(lambda p: p * np.nan, POSITIONS)


def test_bad_input():
    with pytest.raises(ValueError, match=r"x has lengths \[1\]"):
        testing.assert_causal(lambda x: x, np.zeros((2, 1)))
