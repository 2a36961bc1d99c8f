"""The key cache against the uncached forward pass, for every method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.gallery.examples import examples
from fope_jax.model import decode
from fope_jax.model.config import TransformerConfig
from fope_jax.model.decode import forward_cached, greedy_decode, init_cache, prefill, sample_decode
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.position import (
    METHODS,
    ByLayer,
    CoPE,
    DynamicNTK,
    FoPE,
    LocalChunks,
    LongRoPE,
    NoPE,
    RoPE,
    SlidingWindow,
)

LENGTH, PROMPT, VOCAB = 21, 9, 53
METHOD_EXAMPLES = {
    label: method for label, method in examples(8, 8).items() if label != "learned"
} | {
    "learned": METHODS["learned"](table_length=LENGTH + 3),
    "window": SlidingWindow(FoPE(8), 4),
    "chunks": LocalChunks(RoPE(), 5),
    "fope-query": FoPE(8, heads="query"),
    "by_layer-mixed": ByLayer((FoPE(8, heads="query"), CoPE(init_std=0.5))),
}
# One for each hook; a method that differs in its numbers alone takes the path of one of these.
FAST = {"learned", "fire", "by_layer-mixed"}


def new_model(position, **changes):
    config = (
        dict(
            vocab_size=VOCAB,
            d_model=24,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=32,
            init_std=0.4,
            attention="reference",
        )
        | changes
    )
    return Transformer(TransformerConfig(**config), position, rngs=nnx.Rngs(1))


def batch(rows=2, length=LENGTH):
    return np.random.default_rng(2).integers(0, VOCAB, (rows, length)).astype(np.int32)


def read_in_pieces(model, tokens, start):
    """Hidden states of a prompt of ``start`` tokens and of one token at a time after it."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    ones = jnp.ones_like(positions)
    cache = init_cache(model, rows, length + 3)  # slots that stay empty are not seen
    first, cache = forward_cached(model, cache, *(x[:, :start] for x in (tokens, positions, ones)))

    def step(cache, column):
        hidden, cache = forward_cached(model, cache, *(x[:, None] for x in column))
        return cache, hidden[:, 0]

    columns = tuple(x[:, start:].T for x in (tokens, positions, ones))
    cache, later = jax.lax.scan(step, cache, columns)
    return jnp.concatenate([first, later.swapaxes(0, 1)], axis=1)


@jax.jit
def both_ways(model, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    whole = model.hidden(tokens, positions, jnp.ones_like(positions))
    return read_in_pieces(model, tokens, PROMPT), whole


@pytest.mark.fast("by_layer-mixed")
@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=() if label in FAST else pytest.mark.slow)
        for label in METHOD_EXAMPLES
    ],
)
def test_cached_keys_give_the_uncached_forward_pass(label):
    cached, whole = both_ways(new_model(METHOD_EXAMPLES[label]), batch())
    assert float(jnp.std(whole)) > 0.5
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-4)


def test_a_cache_of_bfloat16_gives_the_uncached_forward_pass():
    cached, whole = both_ways(new_model(FoPE(8), dtype="bfloat16"), batch())
    assert cached.dtype == whole.dtype == jnp.bfloat16
    exact = jax.jit(hidden_of)(new_model(FoPE(8)), batch())
    rounding = np.abs(np.asarray(whole, np.float32) - exact).mean()
    difference = np.abs(np.asarray(cached, np.float32) - np.asarray(whole, np.float32)).mean()
    assert difference < 2 * rounding < 0.1


def test_every_method_is_tested():
    used = {type(method) for method in METHOD_EXAMPLES.values()}
    assert used >= set(METHODS.values())


FOLLOWING = {
    "dynamic_ntk": RoPE(theta=100.0, scaling=(DynamicNTK(4.0, 12),)),
    "longrope": RoPE(
        theta=100.0, scaling=(LongRoPE((1.0,) * 4, (1.0, 2.0, 3.0, 4.0), 12, 4.0, None),)
    ),
    "by_layer": ByLayer((RoPE(theta=100.0, scaling=(DynamicNTK(4.0, 12),)), NoPE())),
}


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dynamic_ntk", pytest.param("longrope", marks=pytest.mark.slow)])
def test_frequencies_that_follow_the_length_are_exact_as_far_as_they_can_be(label):
    """One layer at any length: all keys turn anew. More layers up to the original length of 12,
    and as one piece; beyond it what a layer reads of an early token was computed at that token's
    length, in the uncached pass at the length of the whole."""
    position = FOLLOWING[label]
    one_layer = new_model(position, num_layers=1)
    cached, _ = both_ways(one_layer, batch())
    for length in (PROMPT + 1, LENGTH):
        whole = jax.jit(hidden_of)(one_layer, batch()[:, :length])
        np.testing.assert_allclose(cached[:, length - 1], whole[:, -1], rtol=1e-4, atol=1e-4)

    model = new_model(position)
    cached, whole = both_ways(model, batch())
    within = jax.jit(hidden_of)(model, batch()[:, :12])
    np.testing.assert_allclose(cached[:, :12], within, rtol=1e-4, atol=1e-4)
    assert np.abs(cached[:, -1] - whole[:, -1]).max() > 1e-2


@pytest.mark.fast("None-True", "3-False")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_queries_and_keys_of_a_packed_row_turn_at_one_length(window, keep):
    """The second document is shorter than the first, which gives the length of the row; a window
    keeps nothing of the first."""
    position = FOLLOWING["by_layer"].methods[0]
    position = position if window is None else SlidingWindow(position, window)
    model, tokens = new_model(position, num_layers=1), batch(1, 24)
    positions = np.concatenate([np.arange(16), np.arange(8)])[None].astype(np.int32)
    rows = (tokens, positions, np.repeat([[1, 2]], [16, 8], axis=1).astype(np.int32))

    @jax.jit
    def read(model, *rows):
        cache = init_cache(model, 1, 24)
        _, cache = forward_cached(model, cache, *(x[:, :20] for x in rows))
        last, _ = forward_cached(model, cache, *(x[:, 20:] for x in rows), keep=keep)
        return last, model.hidden(*rows)[:, 20:]

    np.testing.assert_allclose(*read(model, *rows), rtol=1e-4, atol=1e-4)


def hidden_of(model, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return model.hidden(tokens, positions, jnp.ones_like(positions))


def test_a_prompt_read_as_one_piece_follows_its_length():
    model = new_model(FOLLOWING["by_layer"])

    @jax.jit
    def hidden(tokens):
        return prefill(model, tokens, jnp.ones_like(tokens), room=4)[0], hidden_of(model, tokens)

    np.testing.assert_allclose(*hidden(batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "position",
    [FoPE(8), pytest.param(CoPE(init_std=0.5), marks=pytest.mark.slow)],
    ids=["fope", "cope"],
)
def test_greedy_writes_what_the_uncached_model_holds_most_likely(position):
    model, tokens = new_model(position, attention="chunked", qk_norm="head"), batch(3, 11)
    prompts = tokens.copy()
    prompts[1, :4] = 0  # a prompt of 7 tokens, at the end of its row
    segments = np.ones_like(prompts)
    segments[1, :4] = 0

    @jax.jit
    def write(tokens, segments):
        return greedy_decode(model, *prefill(model, tokens, segments, room=5), 6)

    written = write(prompts, segments)
    assert written.shape == (3, 6)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    more = np.arange(1, 6)
    read_all = np.concatenate([prompts, written[:, :-1]], axis=1)
    positions = np.concatenate([positions, positions[:, -1:] + more], axis=1).astype(np.int32)
    segments = np.concatenate([segments, np.ones((3, 5), np.int32)], axis=1)
    logits = jax.jit(lambda *rows: model(*rows))(read_all, positions, segments)
    np.testing.assert_array_equal(written, np.argmax(logits[:, 10:], axis=-1))

    excluded = tuple({int(token) for token in written[:, 0]})

    @jax.jit
    def write_another(tokens, segments):
        return greedy_decode(model, *prefill(model, tokens, segments, room=1), 1, excluded)

    allowed = np.array(logits[:, 10])
    allowed[:, excluded] = -np.inf
    other = write_another(prompts, np.asarray(segments)[:, :11])
    np.testing.assert_array_equal(other[:, 0], allowed.argmax(axis=-1))


@pytest.mark.parametrize(
    "position",
    [FoPE(8), pytest.param(METHOD_EXAMPLES["by_layer-mixed"], marks=pytest.mark.slow)],
    ids=["fope", "by_layer"],
)
def test_long_continuations_read_layers_from_arrays_of_their_own(position, monkeypatch):
    """They are those of a scan over stacked layers."""
    model, tokens = new_model(position, num_layers=2 * len(position.layers())), batch(2, 11)
    fields = {"count": 5, "temperature": 1.0, "key": jax.random.key(3), "stop": None}

    def write(tokens):
        read = prefill(model, tokens, jnp.ones_like(tokens), room=5)
        return greedy_decode(model, *read, 5), sample_decode(model, *read, 5, **fields)

    stacked = jax.jit(write)(tokens)
    monkeypatch.setattr(decode, "UNSTACKED_FROM", 5)
    apart = jax.jit(lambda tokens: write(tokens)).lower(tokens)
    assert "optimization_barrier" in apart.as_text()
    for one, other in zip(apart.compile()(tokens), stacked, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_samples_are_drawn_from_the_logits_of_the_uncached_model():
    """Also up to a token that ends a row, at any temperature and count with one program."""
    model, prompts, size, compiled = new_model(FoPE(8)), batch(2, 7), 6, []

    @partial(jax.jit, static_argnames="stop")
    def sample(count, temperature, stop=None):
        compiled.append(stop)
        settings = {"count": count, "temperature": temperature, "key": jax.random.key(3)}
        read = prefill(model, prompts, jnp.ones_like(prompts), size - 1)
        return sample_decode(model, *read, size, stop=stop, **settings)

    @jax.jit
    def choices(tokens, temperature):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        logits = model(tokens, positions, jnp.ones_like(positions))[:, 6:-1]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(size))
        draw = jax.vmap(jax.random.categorical, in_axes=(0, 1), out_axes=1)
        return draw(keys, logits / temperature), jnp.argmax(logits, axis=-1)

    for temperature in (0.0, 0.5, 2.0):
        written = sample(np.int32(size), np.float32(temperature))
        drawn, greedy = choices(np.concatenate([prompts, written], axis=1), temperature or 1.0)
        np.testing.assert_array_equal(written, drawn if temperature else greedy)
    some = sample(np.int32(4), np.float32(2.0))
    np.testing.assert_array_equal(some[:, :4], written[:, :4])
    assert not some[:, 4:].any() and compiled == [None]

    row = np.asarray(written)[0].tolist()
    stop = row[2]
    ended = sample(np.int32(size), np.float32(2.0), stop)
    end = row.index(stop) + 1
    np.testing.assert_array_equal(ended[0, :end], row[:end])
    rest = np.asarray(written)[1].tolist()
    last = (rest.index(stop) + 1) if stop in rest else size  # the other row goes on
    np.testing.assert_array_equal(ended[1, :last], rest[:last])
    assert not ended[:, max(end, last) :].any()


def test_each_token_is_drawn_with_noise_of_its_own():
    """All tokens are embedded alike, so that every next token has the same logits."""
    model, size, key = new_model(NoPE(), num_layers=1), 6, jax.random.key(3)
    model.embedding[...] = jnp.broadcast_to(model.embedding[0], model.embedding.shape)
    settings = {"count": size, "temperature": 2.0, "key": key, "stop": None}

    @jax.jit
    def write(tokens):
        read = prefill(model, tokens, jnp.ones_like(tokens), size - 1)
        logits = model.unembed(read[0][:, -1:])[:, 0]
        draw = jax.vmap(lambda i: jax.random.categorical(jax.random.fold_in(key, i), logits / 2))
        return sample_decode(model, *read, size, **settings), draw(jnp.arange(size)).T

    written, drawn = write(batch(2, 7))
    np.testing.assert_array_equal(written, drawn)
    assert all(len(set(row)) > 2 for row in written.tolist())


def test_samples_follow_positions_with_fractions_too():
    model, tokens = new_model(FoPE(8)), batch(2, 7)
    positions = np.arange(7, dtype=np.float32)[None].repeat(2, 0) / 2
    settings = {"count": 3, "temperature": 0.0, "key": jax.random.key(0), "stop": None}

    def write(tokens):
        read = prefill(model, tokens, jnp.ones_like(tokens), 2, positions)
        return greedy_decode(model, *read, 3), sample_decode(model, *read, 3, **settings)

    np.testing.assert_array_equal(*jax.jit(write)(tokens))


def test_a_method_that_ends_says_so():
    model = new_model(METHODS["learned"](table_length=16))
    with pytest.raises(ValueError, match="a cache of 17 tokens: Learned is defined for at most 16"):
        init_cache(model, 1, 17)


def places(start, count, rows=2):
    """Tokens, positions and segments of ``count`` tokens."""
    positions = jnp.broadcast_to(jnp.arange(start, start + count, dtype=jnp.int32), (rows, count))
    return positions % VOCAB, positions, jnp.ones_like(positions)


@pytest.mark.slow
def test_a_full_cache_refuses_another_token():
    """Before anything is computed: one token too many, too many at once, and in greedy decoding."""
    model = new_model(RoPE(), num_layers=1)
    cache = init_cache(model, 2, 4)
    with pytest.raises(ValueError, match="5 tokens more: the key cache has 4 slots, 0 of them"):
        forward_cached(model, cache, *places(0, 5))
    # The cache is closed over, so that the number of its used places stays known.
    hidden, cache = jax.jit(lambda *rows: forward_cached(model, cache, *rows))(*places(0, 4))
    assert np.isfinite(hidden).all() and cache.filled == 4
    with pytest.raises(ValueError, match="1 tokens more: the key cache has 4 slots, 4 of them"):
        forward_cached(model, cache, *places(4, 1))

    def written(count):
        tokens = jnp.ones((1, 3), jnp.int32)
        return jax.eval_shape(
            lambda tokens: greedy_decode(model, *prefill(model, tokens, tokens, room=2), count),
            tokens,
        )

    assert written(3).shape == (1, 3)
    with pytest.raises(ValueError, match="3 tokens more: the key cache has 5 slots, 3 of them"):
        written(4)
    with pytest.raises(ValueError, match="count=0: expected 1 token or more"):
        written(0)


def test_a_full_cache_gives_nan_where_it_cannot_be_known_before():
    """Under jit the number of used places is a traced number; what is read beyond it is NaN."""
    model = new_model(RoPE(), num_layers=1)
    step = jax.jit(lambda cache, *rows: forward_cached(model, cache, *rows))
    cache = init_cache(model, 2, 3)
    for index in range(5):
        hidden, cache = step(cache, *places(index, 1))
        assert np.isnan(hidden).all() if index >= 3 else np.isfinite(hidden).all()
    with pytest.raises(ValueError, match="4 tokens more: the key cache has 3 slots"):
        step(cache, *places(0, 4))


def test_greedy_of_nan_writes_no_token():
    """NaN has no most likely token; argmax alone would say token 0."""
    model = new_model(RoPE(), num_layers=1)
    model.final_norm[...] = model.final_norm[...] * jnp.nan
    tokens = jnp.ones((1, 3), jnp.int32)
    written = jax.jit(lambda t: greedy_decode(model, *prefill(model, t, t, room=2), 2))(tokens)
    assert written.tolist() == [[-1, -1]]


def test_greedy_writes_no_token_where_the_logits_are_not_finite():
    graphdef, params, constants = split(new_model(NoPE()))
    params["embedding"] = params["embedding"].at[5].set(np.nan).at[6].set(np.inf)
    model = merge(graphdef, params, constants)
    tokens = np.array([[1, 2, 3], [1, 5, 3], [6, 2, 3]], np.int32)
    written = jax.jit(
        lambda model: greedy_decode(
            model, *prefill(model, tokens, jnp.ones_like(tokens), room=2), 3
        )
    )(model)
    assert (np.asarray(written)[1:] == -1).all() and (np.asarray(written)[0] >= 0).all()


@pytest.mark.parametrize(
    ("position", "dtype"),
    [(RoPE(), "float32"), (SlidingWindow(RoPE(), 3000), "float32"), (RoPE(), "bfloat16")],
    ids=["all", "window", "bfloat16"],
)
def test_new_tokens_are_written_into_the_cache_and_copy_no_more_of_it(position, dtype):
    """The loop holds the cache once; a scan over its layers would write a second one a token, and
    to write bfloat16 numbers XLA on CPU would widen all of it."""
    model, size = new_model(position, num_layers=8, dtype=dtype), 4096
    cache = jax.eval_shape(lambda: init_cache(model, 1, size))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    graphdef, *arrays = split(model)

    def write(arrays, hidden, cache, position):
        return greedy_decode(merge(graphdef, *arrays), hidden, cache, position, 9)

    hidden = jax.ShapeDtypeStruct((1, 1, 24), dtype)
    place = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = cache._replace(filled=jax.ShapeDtypeStruct((), jnp.int32))
    compiled = jax.jit(write).lower(arrays, hidden, cache, place).compile()
    one_layer = held / 8
    # The carried copy, and what attention to one layer takes: its keys and values in its order,
    # in bfloat16 also widened.
    layers = 3 if dtype == "float32" else 9
    assert held <= compiled.memory_analysis().temp_size_in_bytes < held + layers * one_layer
    stack = ",".join(map(str, cache.layers[0].keys.shape))
    assert (f"f32[{stack}]" in compiled.as_text()) == (dtype == "float32")
