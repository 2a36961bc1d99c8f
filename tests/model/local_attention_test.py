"""Windows, chunks, sinks, a second version for far keys and running sums, in every path."""

import functools
from dataclasses import field, make_dataclass

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

from fope_jax.model import attention
from fope_jax.model.attention import attention_logits
from fope_jax.model.config import TransformerConfig
from fope_jax.model.decode import forward_cached, init_cache
from fope_jax.model.layer_pattern import layer_pattern
from fope_jax.model.masks import TokenIndex, attention_mask, visible_key_blocks
from fope_jax.model.running_sums import running_sums
from fope_jax.model.transformer import Transformer
from fope_jax.position import ALiBi, ByLayer, CoPE, FoPE, LocalChunks, NoPE, RoPE, SlidingWindow
from tests.model.everything import Everything
from tests.model.rows import packed

STATIC = ("bias_fn", "contextual_fn", "backend", "block", "window", "chunk", "far_from")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


BATCH, HEADS, KV_HEADS, WIDE, HEAD_DIM = 3, 4, 2, 6, 4
INDEX = packed([[30, 9, 31], [70], [3, 40]], 70)
ORDER = np.random.default_rng(0).permutation(70)


def slope(variables, q_positions, k_positions):
    distance = (q_positions[:, None, :, None] - k_positions[:, None, None, :]).astype(jnp.float32)
    return -variables["slope"][None, :, None, None] * distance


def inputs(wide=WIDE, order=slice(None)):
    q, k = normal(1, BATCH, 70, HEADS, wide), normal(2, BATCH, 70, KV_HEADS, wide)
    v = normal(3, BATCH, 70, KV_HEADS, HEAD_DIM)
    sums = running_sums(-np.abs(normal(4, BATCH, 70, HEADS)) / 8)
    trained = {"slope": np.abs(normal(5, HEADS)) / 8}
    return [x[:, order] for x in (q, k, v, sums)] + [normal(6, HEADS), trained]


@functools.partial(jax.jit, static_argnames=STATIC)
def attend(arrays, index, **settings):
    q, k, v, sums, sinks, trained = arrays
    return attention.attend(
        *(q, k, v),
        q_positions=index[0],
        k_positions=index[0],
        q_segments=index[1],
        k_segments=index[1],
        bias_fn=slope,
        bias_variables=trained,
        q_sums=sums,
        k_sums=sums,
        sinks=sinks,
        **settings,
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def value_and_gradients(arrays, index, weights, **settings):
    def weighted(arrays):
        out = attend(arrays, index, **settings)
        return jnp.vdot(weights, out), out

    (_, out), gradients = jax.value_and_grad(weighted, has_aux=True)(arrays)
    # Both parts of a sum have the same derivative; the two paths may give it to either.
    q, k, v, sums, sinks, trained = gradients
    return out, (q, k, v, sums[..., 0], sinks, trained)


def definition(arrays, index, window=None, chunk=None, far_from=None):
    """Attention one query at a time, in float64."""
    q, k, v, sums, sinks = (np.asarray(x, np.float64) for x in arrays[:-1])
    slopes, (positions, segments) = np.asarray(arrays[-1]["slope"], np.float64), index
    sums = sums.sum(-1)
    half = q.shape[-1] // 2
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t in np.ndindex(*q.shape[:2]):
        for n in range(HEADS):
            logits, values = [sinks[n]], [np.zeros(v.shape[-1])]
            for s in range(k.shape[1]):
                distance = positions[b, t] - positions[b, s]
                if distance < 0 or segments[b, s] != segments[b, t] or segments[b, t] == 0:
                    continue
                if window is not None and distance >= window:
                    continue
                if chunk is not None and positions[b, t] // chunk != positions[b, s] // chunk:
                    continue
                part = slice(None)
                if far_from is not None:
                    part = slice(half, None) if distance >= far_from else slice(0, half)
                key = k[b, s, n // (HEADS // KV_HEADS)]
                product = q[b, t, n, part] @ key[part] / np.sqrt(HEAD_DIM)
                logits.append(product - slopes[n] * distance + sums[b, t, n] - sums[b, s, n])
                values.append(v[b, s, n // (HEADS // KV_HEADS)])
            weights = np.exp(np.array(logits) - max(logits))
            out[b, t, n] = weights @ np.array(values) / weights.sum()
    return out


LIMITS = {
    "nothing more": {},
    "window": {"window": 12},
    "window of one token": {"window": 1},
    "chunk": {"chunk": 10},
    "far": {"far_from": 9},
    "window, chunk and far": {"window": 25, "chunk": 40, "far_from": 7},
}


@pytest.mark.fast("window, chunk and far", "stored in any order")
@pytest.mark.parametrize(
    "name, order",
    [(name, slice(None)) for name in LIMITS] + [("window, chunk and far", ORDER)],
    ids=[*LIMITS, "stored in any order"],
)
def test_both_paths_are_the_definition(name, order):
    arrays, index = inputs(order=order), tuple(x[:, order] for x in INDEX)
    weights = normal(9, BATCH, 70, HEADS, HEAD_DIM)
    expected = definition(arrays, index, **LIMITS[name])
    by_path = {
        backend: value_and_gradients(
            arrays, index, weights, backend=backend, block=16, **LIMITS[name]
        )
        for backend in ("reference", "chunked")
    }
    np.testing.assert_allclose(by_path["reference"][0], expected, rtol=1e-5, atol=2e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        by_path["chunked"],
        by_path["reference"],
    )


def test_the_logits_of_analysis_are_those_of_attention():
    q, k, v, sums, _, trained = inputs()
    limits = LIMITS["window, chunk and far"]
    logits = jax.jit(
        lambda: attention_logits(
            q,
            k,
            positions=INDEX[0],
            segments=INDEX[1],
            variables=trained,
            head_dim=HEAD_DIM,
            bias_fn=slope,
            sums=sums,
            **limits,
        )
    )()
    values = np.repeat(v, HEADS // KV_HEADS, axis=2)
    is_empty = ~(logits > -np.inf).any(-1, keepdims=True)
    attended = np.einsum("bnts,bsnh->btnh", jax.nn.softmax(np.where(is_empty, 0, logits)), values)
    attended = np.where(is_empty.swapaxes(1, 2), 0, attended)
    no_sinks = [q, k, v, sums, np.full(HEADS, -1e30, np.float32), trained]
    expected = attend(no_sinks, INDEX, backend="chunked", block=16, **limits)
    np.testing.assert_allclose(attended, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**16),
    ordered=st.booleans(),
    highest=st.integers(0, 4),
    window=st.none() | st.integers(1, 9),
    chunk=st.none() | st.integers(1, 9),
)
def test_no_block_with_a_visible_key_is_left_out(seed, ordered, highest, window, chunk):
    random = np.random.default_rng(seed)
    segments = random.integers(0, highest + 1, (2, 24)).astype(np.int32)
    positions = random.integers(0, 12, (2, 24)).astype(np.int32)
    if ordered:
        order = np.lexsort((positions, segments))
        segments, positions = (np.take_along_axis(x, order, 1) for x in (segments, positions))

    def blocks(x):
        return x.reshape(2, 6, 4).swapaxes(0, 1)

    index = TokenIndex(blocks(positions), blocks(segments))
    order, count = visible_key_blocks(index, index, window, chunk)
    mask = attention_mask(
        TokenIndex(positions, segments), TokenIndex(positions, segments), window, chunk
    )
    by_block = np.asarray(mask).reshape(2, 6, 4, 6, 4).any((0, 2, 4))
    for row in range(6):
        assert set(np.flatnonzero(by_block[row])) <= set(np.asarray(order[row])[: count[row]])


def test_a_window_visits_the_blocks_that_it_touches():
    length, block, window = 4096, 64, 200
    positions = np.arange(length, dtype=np.int32).reshape(-1, 1, block)
    index = TokenIndex(positions, np.ones_like(positions))
    _, count = visible_key_blocks(index, index, window)
    assert count.max() == -(-(window - 1) // block) + 1
    _, all_before = visible_key_blocks(index, index)
    np.testing.assert_array_equal(all_before, np.arange(length // block) + 1)
    _, of_chunk = visible_key_blocks(index, index, chunk=4 * block)
    np.testing.assert_array_equal(of_chunk, np.arange(length // block) % 4 + 1)


# ---------------------------------------------------------------------------- running sums


@pytest.mark.slow
def test_running_sums_keep_the_bias_between_neighbours():
    """A single float32 sum is off by more than 1e-3 after 65,536 tokens; the pair stays at 1e-5."""
    increments = -np.abs(normal(1, 1, 65_536, 2)) * 3
    sums = np.asarray(running_sums(increments), np.float64)
    exact = np.cumsum(increments.astype(np.float64), axis=1)
    apart = np.random.default_rng(2).integers(1, 4000, 500)
    at = np.random.default_rng(3).integers(4000, 65_536, 500)
    high, low = (x[:, at] - x[:, at - apart] for x in (sums[..., 0], sums[..., 1]))
    bias = np.float32(high) + np.float32(low)
    expected = exact[:, at] - exact[:, at - apart]
    single = np.cumsum(increments, axis=1)
    assert np.abs(single[:, at] - single[:, at - apart] - expected).max() > 1e-3
    near = apart < 40
    assert np.abs(bias - expected)[:, near].max() < 2e-5
    assert np.abs(bias / expected - 1).max() < 2e-6


@pytest.mark.slow
def test_running_sums_have_the_gradient_of_a_sum_in_both_modes():
    increments, tangent = normal(1, 2, 300, 3), normal(2, 2, 300, 3)

    def total(x):
        sums = running_sums(x)
        return sums[..., 0] + sums[..., 1]

    weights = normal(3, 2, 300, 3)
    gradient = jax.grad(lambda x: jnp.vdot(weights, total(x)))(increments)
    expected = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    _, moved = jax.jvp(total, (increments,), (tangent,))
    np.testing.assert_allclose(moved, np.cumsum(tangent, axis=1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the model


SIZES = {
    "vocab_size": 53,
    "d_model": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 32,
    "init_std": 0.4,
}
MODELS = {
    "windows of the model": (FoPE(8), {"num_layers": 4, "windows": (5, None)}),
    "windows of the method": (
        ByLayer((SlidingWindow(RoPE(), 5), LocalChunks(ALiBi(), 6), NoPE())),
        {"num_layers": 3},
    ),
    "everything": (
        Everything(theta=100.0),
        {"num_layers": 4, "windows": (5, None), "attention_sinks": True},
    ),
    "contextual": (CoPE(init_std=0.5), {"num_layers": 2, "windows": (5, 7)}),
}


def new_model(name, **changes):
    position, sizes = MODELS[name]
    model = Transformer(TransformerConfig(**SIZES | sizes | changes), position, rngs=nnx.Rngs(1))
    if "sinks" in model.layers:
        sinks = model.layers["sinks"]
        sinks[...] = jnp.asarray(normal(8, *sinks.shape)) + 1.0
    return model


def tokens(rows, length):
    return np.random.default_rng(2).integers(0, 53, (rows, length)).astype(np.int32)


@jax.jit
def hidden(model, tokens, positions, segments):
    return model.hidden(tokens, positions, segments)


@functools.partial(jax.jit, static_argnums=2)
def decoded(model, tokens, pieces):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    cache, start, parts = init_cache(model, len(tokens), tokens.shape[1] + 3), 0, []
    for size in pieces:
        piece = slice(start, start + size)
        new, at = tokens[:, piece], positions[:, piece]
        part, cache = forward_cached(model, cache, new, at, jnp.ones_like(at))
        parts, start = [*parts, part], start + size

    def step(cache, column):
        token, position = (x[:, None] for x in column)
        out, cache = forward_cached(model, cache, token, position, jnp.ones_like(position))
        return cache, out[:, 0]

    _, later = jax.lax.scan(step, cache, (tokens[:, start:].T, positions[:, start:].T))
    return jnp.concatenate([*parts, later.swapaxes(0, 1)], axis=1)


# The model with every hook at once runs fast; the others, of which each tests one, are slow.
every_model = pytest.mark.parametrize(
    "name", [n if n == "everything" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)


@every_model
def test_a_cache_that_keeps_the_window_gives_the_uncached_pass(name):
    """A long piece, one shorter than the windows, one of their size, then token by token."""
    model, batch = new_model(name, attention="reference"), tokens(2, 31)
    positions = np.arange(31, dtype=np.int32)[None]
    whole = hidden(model, batch, positions, np.ones_like(positions))
    assert float(jnp.std(whole)) > 0.5
    np.testing.assert_allclose(decoded(model, batch, (11, 2, 5)), whole, rtol=1e-4, atol=2e-4)
    slots = [layer.keys.shape[3] for layer in init_cache(model, 1, 64).layers]
    limits = [layer.window or layer.chunk or 64 for layer in model.pattern]
    assert slots == limits


@every_model
def test_continuations_of_one_prompt_do_not_see_each_other(name):
    """Three, longer than the windows, after one prompt whose cache is not changed."""
    changes = {"num_layers": 2} if name == "everything" else {}  # all its kinds of layers, once
    model, prompt = new_model(name, attention="reference", **changes), tokens(2, 17)
    endings = np.random.default_rng(3).integers(0, 53, (3, 2, 9)).astype(np.int32)

    @jax.jit
    def read(model, prompt, endings):
        at = jnp.broadcast_to(jnp.arange(26, dtype=jnp.int32), (2, 26))
        ones = jnp.ones_like(at)
        read = functools.partial(forward_cached, model)
        _, cache = read(init_cache(model, 2, 26), prompt, at[:, :17], ones[:, :17])

        def read_ending(ending):
            return read(cache, ending, at[:, 17:], ones[:, 17:], keep=False)[0]

        return jax.vmap(read_ending)(endings), read(cache, endings[0], at[:, 17:], ones[:, 17:])[0]

    found, kept = read(model, prompt, endings)
    np.testing.assert_allclose(found[0], kept, rtol=1e-4, atol=2e-4)
    at = np.arange(26, dtype=np.int32)[None]
    for ending, each in zip(endings, found, strict=True):
        whole = hidden(model, np.concatenate([prompt, ending], axis=1), at, np.ones_like(at))
        np.testing.assert_allclose(each, whole[:, 17:], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
@every_model
def test_packed_documents_are_separate_ones_in_both_paths(name):
    model, batch = new_model(name, attention_block=8, attention="chunked"), tokens(1, 33)
    reference = new_model(name, attention="reference")
    index = packed([[13, 17]], 33)
    together = hidden(model, batch, *index)
    np.testing.assert_allclose(
        together[:, :30], hidden(reference, batch, *index)[:, :30], rtol=1e-4, atol=2e-4
    )
    alone = packed([[17]], 33)
    second = hidden(model, np.roll(batch, -13, axis=1), *alone)
    np.testing.assert_allclose(together[:, 13:30], second[:, :17], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_loop_and_scan_are_one_where_the_windows_repeat_the_method():
    name, batch = "everything", tokens(1, 12)
    positions = np.arange(12, dtype=np.int32)[None]
    arrays = (batch, positions, np.ones_like(positions))
    scanned = hidden(new_model(name), *arrays)
    looped = hidden(new_model(name, scan_layers=False, remat="full"), *arrays)
    np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-4)


def test_what_a_layer_with_a_window_can_know():
    """Two layers with a window of w see 2 (w - 1) tokens back, and nothing further."""
    model = Transformer(
        TransformerConfig(**SIZES, num_layers=2, windows=(5,)), RoPE(), rngs=nnx.Rngs(1)
    )
    batch = tokens(1, 24)
    changed = batch.copy()
    changed[0, 3] = (changed[0, 3] + 1) % 53
    positions = np.arange(24, dtype=np.int32)[None]
    ones = np.ones_like(positions)
    moved = np.abs(hidden(model, batch, positions, ones) - hidden(model, changed, positions, ones))
    moved = moved.max(axis=(0, 2)) > 0
    assert moved[3:12].all() and not moved[:3].any() and not moved[12:].any()


def test_a_running_bias_refuses_rows_that_are_not_stored_by_position():
    model, batch = new_model("everything"), tokens(2, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)).copy()
    positions[1] = positions[1, ::-1]
    out = hidden(model, batch, positions, np.ones_like(positions))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"windows": (4, 0)}, r"windows\[1\]=0: tokens that a query sees.* must be 1 or more"),
        ({"windows": (2.5,)}, r"windows\[0\]=2.5: .*, a whole number"),
        ({"windows": (float("nan"),)}, r"windows\[0\]=nan: .*, a whole number"),
        ({"windows": (True,)}, r"windows\[0\]=True: .*, a whole number"),
        ({"windows": (2**31,)}, r"windows\[0\]=2147483648: .* at most 2147483647"),
        (
            {"windows": (4, None, None)},
            "NoPE repeats after 1 layers, with windows of 3 after 3: num_layers=4",
        ),
    ],
)
def test_windows_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        layer_pattern(TransformerConfig(**SIZES, num_layers=4, **change), NoPE())


@pytest.mark.parametrize("slopes", [[1.0] * 4, np.ones(4)], ids=["list", "array"])
def test_a_knob_that_cannot_be_hashed_is_named(slopes):
    """Flax would say "unhashable type" alone, while it makes the model."""
    cls = make_dataclass("Own", [("slopes", object)], bases=(NoPE,), frozen=True)
    with pytest.raises(ValueError, match=r"Own.slopes = .* is a (list|ndarray); accepted: a num"):
        layer_pattern(TransformerConfig(**SIZES, num_layers=4), cls(slopes))
    unseen = make_dataclass(
        "Own", [("slopes", object, field(hash=False))], bases=(NoPE,), frozen=True
    )
    layer_pattern(TransformerConfig(**SIZES, num_layers=4), unseen(slopes))


def test_a_window_is_stated_once():
    config = TransformerConfig(**SIZES, num_layers=4, windows=(4,))
    with pytest.raises(
        ValueError, match="SlidingWindow has window=9 itself; state it in one place"
    ):
        layer_pattern(config, SlidingWindow(RoPE(), 9))
    with pytest.raises(ValueError, match="window=5: inner has window=9 already; state it once"):
        SlidingWindow(SlidingWindow(RoPE(), 9), 5)
    for window in (0, -3):
        with pytest.raises(ValueError, match=f"window={window}: tokens that a query sees"):
            SlidingWindow(RoPE(), window)
    with pytest.raises(ValueError, match="inner='rope': expected a method such as RoPE"):
        SlidingWindow("rope", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk=2.5: tokens that a query sees.*, a whole number"):
        LocalChunks(RoPE(), 2.5)


def test_a_cache_that_was_made_for_smaller_windows_is_refused():
    model = new_model("windows of the model")
    other = new_model("windows of the model", windows=(3, None))
    positions = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(
        ValueError, match="layer 0 has 3 slots in a cache of 16 tokens: with window=5"
    ):
        forward_cached(model, init_cache(other, 1, 16), positions, positions, positions + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window=0: tokens that a query looks back must be 1 or more"),
        ({"window": 2**31}, "window=2147483648: .* at most 2147483647"),
        ({"far_from": -1}, "far_from=-1: .* must be 1 or more"),
    ],
)
def test_numbers_of_tokens_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        attend(inputs(), INDEX, **change)


def test_sums_and_sinks_of_another_shape_are_named():
    arrays = inputs()
    with pytest.raises(ValueError, match=r"q_sums \(3, 70, 4\): expected \(3, 70, 4, 2\)"):
        attend([*arrays[:3], arrays[3][..., 0], *arrays[4:]], INDEX)
    with pytest.raises(ValueError, match=r"sinks \(2,\): expected \(4,\), a logit a query head"):
        attend([*arrays[:4], arrays[4][:2], arrays[5]], INDEX)
