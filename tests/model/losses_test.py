import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.model.losses import compute_logits, loss_sums, token_nats

B, T, D, V = 3, 11, 8, 37


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def example():
    rng = np.random.default_rng(5)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.integers(0, 3, (B, T)).astype(np.float32) / 2
    return normal(0, B, T, D), normal(1, D, V), targets, weights


def exact_nats(hidden, unembedding, targets):
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0], logits.argmax(-1)


@functools.partial(jax.jit, static_argnames="time_chunk")
def nats_and_gradients(hidden, unembedding, targets, weights, *, time_chunk=None):
    def nats(hidden, unembedding, weights):
        sums = loss_sums(hidden, unembedding, targets, weights, time_chunk=time_chunk)
        return 0.25 * sums.nats, sums  # a factor, so that the cotangent is not 1

    return jax.value_and_grad(nats, argnums=(0, 1, 2), has_aux=True)(hidden, unembedding, weights)


def derived_gradients(hidden, unembedding, targets, weights):
    """What jax derives from the textbook form."""

    def nats(hidden, unembedding, weights):
        log_p = jax.nn.log_softmax(hidden @ unembedding, axis=-1)
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -0.25 * jnp.sum(chosen * weights)

    return jax.jit(jax.grad(nats, argnums=(0, 1, 2)))(hidden, unembedding, weights)


@pytest.mark.parametrize("time_chunk", [None, 4, 11, 100])
def test_sums_and_gradients_are_those_of_the_definition(time_chunk):
    hidden, unembedding, targets, weights = example()
    (_, sums), gradients = nats_and_gradients(
        hidden, unembedding, targets, weights, time_chunk=time_chunk
    )
    nats, best = exact_nats(hidden, unembedding, targets)
    assert sums.nats.item() == pytest.approx((nats * weights).sum(), rel=1e-6)
    assert sums.tokens.item() == weights.sum()
    assert sums.correct.item() == ((best == targets) * weights).sum()
    assert all(x.dtype == jnp.float32 and x.shape == () for x in sums)
    expected = derived_gradients(hidden, unembedding, targets, weights)
    for mine, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("time_chunk", [None, 4])
def test_token_nats_and_their_gradient(time_chunk):
    hidden, unembedding, targets, weights = example()

    def weighted(hidden, unembedding):
        nats, correct = token_nats(hidden, unembedding, targets, time_chunk=time_chunk)
        return 0.25 * jnp.sum(nats * weights), (nats, correct)

    gradient = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    gradients, (nats, correct) = gradient(hidden, unembedding)
    expected, best = exact_nats(hidden, unembedding, targets)
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, best == targets)
    for mine, theirs in zip(
        gradients, derived_gradients(hidden, unembedding, targets, weights)[:2], strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_first_token_as_in_argmax():
    hidden = np.ones((1, 5, 1), np.float32)
    unembedding = np.array([[0.0, 2.0, 1.0, 2.0, 2.0]], np.float32)
    _, correct = token_nats(hidden, unembedding, np.arange(5, dtype=np.int32)[None])
    assert correct.tolist() == [[False, True, False, False, False]]


def test_uniform_logits_cost_ln_v_and_bytes_are_counted():
    _, _, targets, weights = example()
    token_bytes = np.arange(V, dtype=np.int32)
    zeros = np.zeros((B, T, D), np.float32), np.zeros((D, V), np.float32)
    sums = loss_sums(*zeros, targets, weights, token_bytes=token_bytes)
    assert sums.nats.item() == pytest.approx(weights.sum() * np.log(V), rel=1e-6)
    assert sums.bytes.item() == (weights * targets).sum()
    assert loss_sums(*zeros, targets, weights).bytes.item() == 0


@pytest.mark.parametrize("outside", [V, -1, -100, 2**31 - 1])
@pytest.mark.parametrize("time_chunk", [None, 4])
def test_a_target_outside_the_vocabulary_counts_where_it_is_scored_and_nowhere_else(
    outside, time_chunk
):
    hidden, unembedding, targets, weights = example()
    weights[0, :2] = 0, 1
    token_bytes = np.arange(1, V + 1, dtype=np.int32)
    arguments = hidden, unembedding, targets, weights
    clean, (d_hidden, d_unembedding, d_weights) = nats_and_gradients(
        *arguments, time_chunk=time_chunk
    )
    targets[0, 0] = outside
    masked, gradients = nats_and_gradients(*arguments, time_chunk=time_chunk)
    jax.tree.map(np.testing.assert_array_equal, masked, clean)
    np.testing.assert_array_equal(gradients[0], d_hidden)
    np.testing.assert_array_equal(gradients[1], d_unembedding)
    expected = np.array(d_weights)
    expected[0, 0] = 0  # no weight scores a target that does not exist
    np.testing.assert_array_equal(gradients[2], expected)
    known = targets.clip(0, V - 1)
    sums = loss_sums(*arguments, token_bytes=token_bytes, time_chunk=time_chunk)
    assert sums.bytes.item() == (weights * (known + 1)).sum()
    targets[0, 1] = outside
    sums = loss_sums(*arguments, token_bytes=token_bytes, time_chunk=time_chunk)
    assert np.isnan(sums.nats) and np.isnan(sums.bytes)
    assert np.isfinite(sums.correct)


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize(
    ("dtype", "time_chunk"), [("float32", None), ("float32", 4), ("bfloat16", None), ("float16", 4)]
)
def test_scores_that_are_not_finite_are_no_hits(dtype, time_chunk):
    hidden, unembedding, _, _ = example()
    hidden = np.array(jnp.asarray(hidden, dtype).astype(jnp.float32))
    targets = np.asarray(
        compute_logits(jnp.asarray(hidden, dtype), unembedding).argmax(-1), np.int32
    )
    weights = np.ones((B, T), np.float32)
    for row, bad in enumerate(BAD):
        hidden[row, 3] = bad
        hidden[row, 4, 2] = bad
    low, broken = jnp.asarray(hidden, dtype), ~np.isfinite(hidden).all(-1)
    nats, correct = token_nats(low, unembedding, targets, time_chunk=time_chunk)
    np.testing.assert_array_equal(np.isfinite(nats), ~broken)
    np.testing.assert_array_equal(correct, ~broken)  # every target is its argmax
    (_, sums), _ = nats_and_gradients(low, unembedding, targets, weights, time_chunk=time_chunk)
    assert sums.correct.item() == B * T - 6
    assert np.isnan(sums.nats)


@pytest.mark.parametrize("bad", BAD)
def test_an_unembedding_that_is_not_finite_gives_no_hits(bad):
    hidden, unembedding = np.repeat(normal(0, B, 1, D), V, axis=1), normal(1, D, V)
    unembedding[3, 7] = bad
    every = np.broadcast_to(np.arange(V, dtype=np.int32), (B, V))
    nats, correct = token_nats(hidden, unembedding, every)
    assert not (np.asarray(correct) & ~np.isfinite(nats)).any()


def test_bfloat16_hidden_is_close_and_gradients_keep_their_dtypes():
    hidden, unembedding, targets, weights = example()
    (exact, _), exact_gradients = nats_and_gradients(hidden, unembedding, targets, weights)
    low = jnp.asarray(hidden, jnp.bfloat16)
    (nats, _), gradients = nats_and_gradients(low, unembedding, targets, weights)
    assert nats.item() == pytest.approx(exact.item(), rel=0.01)
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for mine, theirs in zip(gradients, exact_gradients, strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "function",
    [
        nats_and_gradients,
        jax.jit(
            lambda h, u, t, w, *, time_chunk: token_nats(h, u, t, time_chunk=time_chunk),
            static_argnames="time_chunk",
        ),
    ],
    ids=["gradient", "token_nats"],
)
def test_chunks_keep_all_logits_from_existing(function):
    batch, length, vocabulary = 2, 512, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((batch, length, D), jnp.float32),
            ((D, vocabulary), jnp.float32),
            ((batch, length), jnp.int32),
            ((batch, length), jnp.float32),
        )
    ]
    all_logits = 4 * batch * length * vocabulary

    def temporary_bytes(time_chunk):
        compiled = function.lower(*shapes, time_chunk=time_chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(None) > all_logits
    assert temporary_bytes(32) < all_logits / 4


def test_logits_are_float32_and_chunks_need_a_token():
    hidden, unembedding, targets, _ = example()
    logits = compute_logits(jnp.asarray(hidden, jnp.bfloat16), unembedding)
    assert logits.dtype == jnp.float32 and logits.shape == (B, T, V)
    with pytest.raises(ValueError, match="time_chunk=0: expected 1 or more"):
        token_nats(hidden, unembedding, targets, time_chunk=0)
