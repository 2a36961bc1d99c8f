"""The scorer of a real model: exact against full logits, and against greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.evaluate import scoring
from fope_jax.evaluate.packed import packed_positions
from fope_jax.evaluate.scoring import model_scorer, score_windows
from fope_jax.model.config import TransformerConfig
from fope_jax.model.masks import TokenIndex
from fope_jax.model.sharding import MeshConfig, make_mesh
from fope_jax.model.transformer import Transformer
from fope_jax.position import ALiBi, FoPE, RoPE

VOCAB = 23


def small_model(position, **changes):
    config = (
        dict(
            vocab_size=VOCAB,
            d_model=16,
            num_layers=2,
            num_heads=2,
            mlp_dim=24,
            attention_block=16,
            init_std=0.5,
        )
        | changes
    )
    return Transformer(TransformerConfig(**config), position, rngs=nnx.Rngs(3))


def full_logits(model, tokens):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model(tokens, positions, jnp.ones_like(positions))


@pytest.mark.parametrize(
    ("position", "logits_in_memory"),
    [(ALiBi(), 2**24), (RoPE(), 3 * VOCAB * 5), (FoPE(training_length=16), 3 * VOCAB * 13 - 1)],
    ids=lambda value: type(value).__name__,
)
def test_scores_are_those_of_the_full_logits(position, logits_in_memory, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_IN_MEMORY", logits_in_memory)
    model = small_model(position)
    stream = np.random.default_rng(0).integers(0, VOCAB, (7, 42))
    nats, hits = score_windows(
        model_scorer(model), lambda i: stream[i], 7, context=41, scored=13, batch_tokens=3 * 41
    )
    logits = np.asarray(jax.jit(lambda tokens: full_logits(model, tokens))(stream[:, :-1]))[:, -13:]
    expected = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), stream[:, -13:, None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(-1) == stream[:, -13:])


@pytest.mark.parametrize("packed", [False, True], ids=["one-segment", "packed"])
def test_what_fills_rows_and_tokens_up_for_a_mesh_changes_no_score(packed, monkeypatch):
    """3 rows of 13 tokens for 2 x 4 devices: 4 rows of 16 tokens, and 4 targets become 8."""
    model, mesh, shapes = small_model(RoPE()), make_mesh(MeshConfig(), jax.devices()[:1]), []
    whole = Transformer.hidden
    rows = np.random.default_rng(4).integers(0, VOCAB, (3, 14)).astype(np.int32)
    window = rows[:, :-1], rows[:, -4:]
    if packed:
        index = packed_positions(np.array([0, 6]), 0, 13)
        window = *window, TokenIndex(*(np.stack([x] * 3) for x in index))
    expected = model_scorer(model)(*window)
    monkeypatch.setattr(scoring, "axis_size", lambda _, axis: {"batch": 2, "length": 4}[axis])
    monkeypatch.setattr(
        Transformer, "hidden", lambda self, *a: (shapes.append(a[0].shape), whole(self, *a))[1]
    )
    nats, hits = model_scorer(model, mesh)(*window)
    assert shapes == [(4, 16)] and nats.shape == (3, 4)
    np.testing.assert_allclose(nats, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hits, expected[1])


def test_each_window_shape_is_traced_once(monkeypatch):
    model, traced = small_model(RoPE()), []
    whole = Transformer.hidden
    monkeypatch.setattr(
        Transformer, "hidden", lambda self, *a: (traced.append(a[0].shape), whole(self, *a))[1]
    )
    scorer = model_scorer(model)
    stream = np.zeros((10, 33), np.int32)
    for _ in range(2):
        for context in (16, 32):
            score_windows(
                scorer,
                lambda i, c=context: stream[i, : c + 1],
                10,
                context=context,
                scored=8,
                batch_tokens=128,
            )
    assert traced == [(8, 16), (4, 32)]


def test_teacher_forcing_agrees_with_greedy_decoding():
    """Half of the answers are what the model writes, half have one token changed."""
    model, rng = small_model(FoPE(training_length=8)), np.random.default_rng(1)
    next_token = jax.jit(lambda tokens, end: full_logits(model, tokens)[:, end - 1].argmax(-1))
    written = rng.integers(0, VOCAB, (40, 24)).astype(np.int32)
    for end in range(20, 24):  # later tokens cannot change what is written earlier: it is causal
        written[:, end] = next_token(written, end)
    answers = written.copy()
    changed = rng.random(40) < 0.5
    places = 20 + rng.integers(0, 4, 40)
    answers[changed, places[changed]] = (answers[changed, places[changed]] + 1) % VOCAB
    _, hits = score_windows(
        model_scorer(model), lambda i: answers[i], 40, context=23, scored=4, batch_tokens=200
    )
    greedy = (answers[:, 20:] == written[:, 20:]).all(axis=1)
    np.testing.assert_array_equal(hits.all(axis=1), greedy)
    assert 10 < greedy.sum() < 30
