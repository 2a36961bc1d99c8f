"""The update: exact accumulation, untouched constants, the gradient it claims to take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fope_jax.config import TrainConfig
from fope_jax.model.config import TransformerConfig
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import make
from fope_jax.train import step as step_module
from fope_jax.train.bad_steps import Guard, RunningMeans
from fope_jax.train.optim import learning_rate, make_optimizer
from fope_jax.train.step import TrainState, all_finite, batch_loss, gradient_sums, train_step
from fope_jax.typing import Batch

SHAPE = {
    "vocab_size": 61,
    "d_model": 32,
    "num_layers": 1,
    "num_heads": 4,
    "mlp_dim": 48,
    "attention": "reference",
    "scan_layers": False,  # compiles faster
}
B, T = 8, 24
CONFIG = TrainConfig(
    steps=50, batch_size=B, length=T, learning_rate=3e-3, warmup_steps=2, weight_decay=0.5
)


def make_batch(seed=0) -> Batch:
    """Two packed documents a row, padding in some, and rows with very different weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SHAPE["vocab_size"], (B, T + 1)).astype(np.int32)
    segments = np.where(np.arange(T) < 10, 1, 2) * np.ones((B, 1), np.int32)
    positions = np.where(np.arange(T) < 10, np.arange(T), np.arange(T) - 10)
    weights = np.ones((B, T), np.float32)
    for row in range(B):
        weights[row, row * 2 + 4 :] = 0.0
        segments[row, 22:] = 0
    return Batch(
        ids[:, :-1],
        ids[:, 1:],
        np.broadcast_to(positions, (B, T)).astype(np.int32),
        segments.astype(np.int32),
        weights,
    )


@functools.cache
def drawn_once():
    position = make("fope", training_length=T)
    return split(Transformer(TransformerConfig(**SHAPE), position, rngs=nnx.Rngs(0)))


def make_model():
    """The same numbers at each call; parameters of its own, which a step may take."""
    graphdef, params, constants = drawn_once()
    return graphdef, jax.tree.map(jnp.copy, params), constants


sums = jax.jit(gradient_sums, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def optimizer():
    """One for all tests: train_step is compiled anew for each optimizer it is given."""
    made = make_optimizer(CONFIG)
    return made._replace(init=jax.jit(made.init))


def test_pieces_add_up_to_the_whole_batch():
    graphdef, params, constants = make_model()
    batch = make_batch()
    whole = sums(graphdef, params, constants, batch, 1)
    pieces = sums(graphdef, params, constants, batch, 4)
    assert float(whole[2]) == float(pieces[2]) == float(batch.weights.sum())
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(x).max()))


def test_positions_given_once_go_into_every_piece():
    graphdef, params, constants = make_model()
    batch = make_batch()
    expected = sums(graphdef, params, constants, batch, 4)
    once = batch._replace(positions=batch.positions[:1])
    got = sums(graphdef, params, constants, once, 4)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))


def test_the_gradient_is_that_of_the_mean_loss_over_scored_tokens(optimizer):
    graphdef, params, constants = make_model()
    batch = make_batch()

    def mean_loss(params):
        logits = merge(graphdef, params, constants)(batch.tokens, batch.positions, batch.segments)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return (losses * batch.weights).sum() / batch.weights.sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    state = TrainState(params, optimizer.init(params))
    _, metrics = train_step(graphdef, optimizer, state, constants, batch)
    np.testing.assert_allclose(metrics.nats / metrics.tokens, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)


def test_training_learns_and_leaves_the_constants_alone(optimizer):
    graphdef, params, constants = make_model()
    before = jax.tree.map(lambda x: np.array(x).tobytes(), constants)
    assert jax.tree.leaves(constants), "FoPE's coefficients are constants"
    state = TrainState(params, optimizer.init(params))
    losses = []
    for _ in range(40):
        state, metrics = train_step(graphdef, optimizer, state, constants, make_batch())
        losses.append(float(metrics.nats / metrics.tokens))
    assert losses[0] == pytest.approx(np.log(SHAPE["vocab_size"]), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.map(lambda x: np.array(x).tobytes(), constants) == before


@pytest.mark.fast("4")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_without_a_scored_token_is_an_update_with_gradient_0(optimizer, accumulate):
    """A window of one token, or one in which every row repeats itself, has no target."""
    graphdef, params, constants = make_model()
    guard, means = Guard(3.0), RunningMeans(jnp.float32(4.0), jnp.float32(2.0), jnp.int32(30))
    batch = make_batch()
    empty = batch._replace(weights=np.zeros_like(batch.weights))
    zeros = jax.tree.map(np.zeros_like, params)
    wanted, moments = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    wanted = jax.tree.map(lambda x, update: np.asarray(x) + np.asarray(update), params, wanted)
    state = TrainState(params, optimizer.init(params), means)
    state, metrics = train_step(
        graphdef, optimizer, state, constants, empty, accumulate=accumulate, guard=guard
    )
    assert [float(x) for x in metrics] == [0.0, 0.0, 0.0, 0.0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, wanted)
    assert all_finite(state.optimizer)
    assert int(state.optimizer[1].count) == int(moments[1].count) == 1
    assert [float(x) for x in state.guard] == [4.0, 2.0, 30.0]


def test_the_state_is_donated(optimizer):
    graphdef, params, constants = make_model()
    state = TrainState(params, optimizer.init(params))
    train_step(graphdef, optimizer, state, constants, make_batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_logits_in_pieces_give_the_same_sums(monkeypatch):
    graphdef, params, constants = make_model()
    batch = make_batch()

    def loss():
        return jax.jit(lambda *arrays: batch_loss(arrays[0], graphdef, *arrays[1:]))

    whole = loss()(params, constants, batch)
    monkeypatch.setattr(step_module, "LOGITS_IN_MEMORY", B * SHAPE["vocab_size"] * 5)
    in_pieces = loss().lower(params, constants, batch)
    assert f"{B}x5x{SHAPE['vocab_size']}x" in in_pieces.as_text()
    pieces = in_pieces.compile()(params, constants, batch)
    np.testing.assert_allclose(whole, pieces, rtol=1e-6)


def test_one_number_that_is_not_finite_is_found():
    tree = {"a": jnp.ones((3, 3)), "b": (jnp.arange(3), jnp.zeros(()))}
    assert all_finite(tree)
    assert not all_finite(tree | {"c": jnp.ones(1000).at[777].set(jnp.inf)})
    assert not all_finite(tree | {"c": jnp.array(jnp.nan)})


# ---------------------------------------------------------------------------- bfloat16 parameters


LOW = {"param_dtype": "bfloat16"}


def low_model(**changes):
    position = make("fope", training_length=T)
    config = TransformerConfig(**SHAPE | LOW | changes)
    return split(Transformer(config, position, rngs=nnx.Rngs(0)))


@pytest.mark.fast("fope")
@pytest.mark.parametrize("method", ["fope", "fire"])
def test_bfloat16_weights_are_those_of_float32_rounded(method):
    knobs = {"training_length": T} if method == "fope" else {}

    def drawn(**changes):
        config = TransformerConfig(**SHAPE | {"qk_norm": "head"} | changes)
        return split(Transformer(config, make(method, **knobs), rngs=nnx.Rngs(0)))[1:]

    (wide, fixed), (low, own) = drawn(), drawn(**LOW)
    jax.tree.map(np.testing.assert_array_equal, own, fixed)
    for path, x in jax.tree_util.tree_leaves_with_path(wide):
        of_position = "position" in path[0].key
        y = dict(jax.tree_util.tree_leaves_with_path(low))[path]
        assert y.dtype == (jnp.float32 if of_position else jnp.bfloat16), path
        np.testing.assert_array_equal(y, x.astype(y.dtype))


@pytest.mark.slow
def test_pieces_add_up_with_bfloat16_parameters_as_with_float32():
    graphdef, params, constants = low_model()
    whole, *_ = sums(graphdef, params, constants, make_batch(), 1)
    pieces, *_ = sums(graphdef, params, constants, make_batch(), 4)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6 * float(jnp.abs(x).max()))
    # The gradient itself is that of the same numbers in float32.
    wide, *_ = make_model()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, *_ = sums(wide, params, constants, make_batch(), 1)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * float(jnp.abs(y).max()))


@pytest.mark.slow
def test_pieces_add_up_with_tied_embeddings_computed_in_bfloat16():
    """Each piece rounds as the whole batch does; only their sum could differ, and it is float32.
    XLA on CPU cannot run every product of bfloat16: `weight_gradient` keeps to those it can."""
    graphdef, params, constants = low_model(tie_embeddings=True, dtype="bfloat16")
    whole, *_ = sums(graphdef, params, constants, make_batch(), 1)
    pieces, *_ = sums(graphdef, params, constants, make_batch(), 8)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3 * float(jnp.abs(x).max()))


@pytest.mark.slow
def test_updates_of_bfloat16_parameters_are_made_in_float32_and_rounded(optimizer):
    """Against AdamW in NumPy, from the step's own gradients; accumulated or not."""
    graphdef, params, constants = low_model()
    state = TrainState(params, optimizer.init(params))
    assert {x.dtype for x in jax.tree.leaves(state.optimizer)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    moments = [jax.tree.map(lambda x: np.zeros(x.shape), params) for _ in range(2)]
    for step, accumulate in enumerate((1, 4)):
        before = jax.tree.map(np.asarray, state.params)
        gradient, _, tokens = sums(graphdef, before, constants, make_batch(step), 1)
        gradient = jax.tree.map(lambda g, n=float(tokens): np.asarray(g, np.float64) / n, gradient)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
        clip = min(1, 1 / norm)
        gradient = jax.tree.map(lambda g, clip=clip: g * clip, gradient)
        m, v = moments = [
            jax.tree.map(lambda m, g, b=b, p=p: b * m + (1 - b) * g**p, old, gradient)
            for old, b, p in zip(moments, (0.9, 0.95), (1, 2), strict=True)
        ]
        rate, n = float(learning_rate(CONFIG, step)), step + 1

        def updated(x, m, v, rate=rate, n=n):
            x = np.asarray(x, np.float64)
            adam = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8)
            return x - rate * (adam + 0.5 * x)

        wanted = jax.tree.map(updated, before, m, v)
        state, _ = train_step(
            graphdef, optimizer, state, constants, make_batch(step), accumulate=accumulate
        )
        for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted), strict=True):
            assert x.dtype in (jnp.bfloat16, jnp.float32)
            exact = np.asarray(y, x.dtype)
            differ = np.asarray(x) != exact
            if x.dtype == jnp.bfloat16:  # but for ties of rounding
                assert differ.mean() < 0.005
        for mine, theirs in ((state.optimizer[1].mu, m), (state.optimizer[1].nu, v)):
            for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                assert x.dtype == jnp.float32
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())
