import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fope_jax.model import attention
from fope_jax.model.attention import Places, visible, visible_blocks

attend = jax.jit(attention.attend, static_argnames=("bias_fn", "backend", "block"))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def bias_fn(variables, q_positions, k_positions):
    """A bias with learnable parameters that is nonlinear in them, and an integer variable."""
    distance = jnp.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
    distance = jnp.minimum(distance, variables["furthest"]).astype(jnp.float32)
    rate = jax.nn.softplus(variables["rate"])[None, :, None, None]
    power = variables["power"][None, :, None, None]
    return -power * jnp.log1p(rate * distance)


def bias_variables(num_heads):
    return {
        "rate": normal(7, num_heads),
        "power": normal(8, num_heads) + 1.0,
        "furthest": np.int32(20),
    }


def in_order(batch, length):
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return positions, np.ones((batch, length), np.int32)


def packed(lengths_of_rows, length):
    """Documents one after the other, and padding to ``length``."""
    positions = np.zeros((len(lengths_of_rows), length), np.int32)
    segments = np.zeros_like(positions)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for index, size in enumerate(lengths):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = index + 1
            start += size
    return positions, segments


def oracle(q, k, v, q_positions, k_positions, q_segments, k_segments, bias=None):
    """Attention one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, num_heads, head_dim = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(length):
            keys = [
                s
                for s in range(k.shape[1])
                if k_segments[b, s] == q_segments[b, t] != 0
                and k_positions[b, s] <= q_positions[b, t]
            ]
            for n in range(num_heads if keys else 0):
                head = n // (num_heads // k.shape[2])
                logits = k[b, keys, head] @ q[b, t, n] / np.sqrt(head_dim)
                if bias is not None:
                    logits = logits + np.asarray(bias, np.float64)[b, n, t, keys]
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights @ v[b, keys, head] / weights.sum()
    return out


# name: (batch, heads, key-value heads, head dim, block, positions and segments of queries, of keys)
DOCUMENTS = packed([[30, 9, 31], [70], [3, 40]], 70)
DECODE_KEYS = packed([[45], [20]], 50)
SHUFFLE = np.random.default_rng(0).permutation(70)
CASES = {
    "plain, one block": (2, 2, 2, 8, 256, in_order(2, 33), in_order(2, 33)),
    "blocks that do not divide": (2, 4, 2, 8, 16, in_order(2, 37), in_order(2, 37)),
    "packed and padded, grouped": (3, 6, 2, 4, 16, DOCUMENTS, DOCUMENTS),
    "packed and padded, one key-value head": (3, 4, 1, 4, 32, DOCUMENTS, DOCUMENTS),
    "stored in any order": (
        3,
        4,
        2,
        4,
        16,
        tuple(x[:, SHUFFLE] for x in DOCUMENTS),
        tuple(x[:, SHUFFLE] for x in DOCUMENTS),
    ),
    "one query, many keys": (
        2,
        4,
        2,
        8,
        16,
        (np.array([[44], [19]], np.int32), np.ones((2, 1), np.int32)),
        DECODE_KEYS,
    ),
    "more keys than queries": (
        2,
        2,
        1,
        8,
        16,
        tuple(x[:, 30:50] for x in in_order(2, 50)),
        in_order(2, 50),
    ),
}


def arrays(name):
    batch, heads, kv_heads, head_dim, block, q_places, k_places = CASES[name]
    q = normal(0, batch, q_places[0].shape[1], heads, head_dim) * 2
    k = normal(1, batch, k_places[0].shape[1], kv_heads, head_dim) * 2
    v = normal(2, batch, k_places[0].shape[1], kv_heads, head_dim)
    places = {
        "q_positions": q_places[0],
        "q_segments": q_places[1],
        "k_positions": k_places[0],
        "k_segments": k_places[1],
    }
    return q, k, v, places, block


@functools.partial(jax.jit, static_argnames=("bias_fn", "backend", "block"))
def value_and_gradients(q, k, v, variables, cotangent, places, *, bias_fn=None, backend, block=1):
    """The output and the gradients of q, k, v and of the floating bias variables."""
    floating = {n: x for n, x in variables.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def attended(q, k, v, floating):
        return attention.attend(
            q,
            k,
            v,
            **places,
            bias_fn=bias_fn,
            bias_variables={**variables, **floating},
            backend=backend,
            block=block,
        )

    out, pull = jax.vjp(attended, q, k, v, floating)
    return out, pull(cotangent)


def run(name, backend, biased=True):
    q, k, v, places, block = arrays(name)
    variables = bias_variables(q.shape[2]) if biased else {}
    return value_and_gradients(
        q,
        k,
        v,
        variables,
        normal(3, *q.shape),
        places,
        bias_fn=bias_fn if biased else None,
        backend=backend,
        block=block,
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    q, k, v, places, _ = arrays(name)
    bias = bias_fn(bias_variables(q.shape[2]), places["q_positions"], places["k_positions"])
    out, _ = run(name, "reference")
    np.testing.assert_allclose(out, oracle(q, k, v, **places, bias=bias), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "biased"), [(name, True) for name in CASES] + [("packed and padded, grouped", False)]
)
def test_chunked_equals_reference_in_value_and_gradient(name, biased):
    out, gradients = run(name, "chunked", biased)
    expected_out, expected_gradients = run(name, "reference", biased)
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    for mine, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**16),
    # Queries, keys, key-value heads, query heads to each, block: few, since each is compiled.
    sizes=st.sampled_from([(23, 17, 2, 2, 4), (9, 4, 1, 3, 7)]),
    num_segments=st.integers(0, 3),
    furthest=st.integers(0, 40),
)
def test_chunked_equals_reference_for_any_layout(seed, sizes, num_segments, furthest):
    length, keys, kv_heads, group, block = sizes
    rng = np.random.default_rng(seed)
    places = {
        "q_positions": rng.integers(0, furthest + 1, (2, length)),
        "k_positions": rng.integers(0, furthest + 1, (2, keys)),
        "q_segments": rng.integers(0, num_segments + 1, (2, length)),
        "k_segments": rng.integers(0, num_segments + 1, (2, keys)),
    }
    places = {name: np.asarray(x, np.int32) for name, x in places.items()}
    q = normal(seed, 2, length, kv_heads * group, 4)
    k = normal(seed + 1, 2, keys, kv_heads, 4)
    v = normal(seed + 2, 2, keys, kv_heads, 4)
    both = functools.partial(value_and_gradients, q, k, v, {}, q + 1, places)
    for mine, theirs in zip(
        jax.tree.leaves(both(backend="chunked", block=block)),
        jax.tree.leaves(both(backend="reference")),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


find_blocks = jax.jit(visible_blocks)


@jax.jit
def any_visible(q_places, k_places):
    return jax.vmap(lambda q: jax.vmap(lambda k: visible(q, k).any())(k_places))(q_places)


def as_blocks(x, size):
    return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**16), ordered=st.booleans(), highest=st.integers(0, 4))
def test_no_block_with_a_visible_key_is_left_out(seed, ordered, highest):
    rng = np.random.default_rng(seed)
    segments = rng.integers(0, highest + 1, (2, 24)).astype(np.int32)
    positions = rng.integers(0, 12, (2, 24)).astype(np.int32)
    if ordered:
        order = np.lexsort((positions, segments), axis=-1)
        segments, positions = (np.take_along_axis(x, order, 1) for x in (segments, positions))
    q_places = Places(as_blocks(positions, 4), as_blocks(segments, 4))
    k_places = Places(as_blocks(positions, 3), as_blocks(segments, 3))
    order, count = (np.asarray(x) for x in find_blocks(q_places, k_places))
    seen = np.asarray(any_visible(q_places, k_places))
    for i in range(6):
        listed = order[i, : count[i]].tolist()
        assert sorted(order[i].tolist()) == list(range(8)) and listed == sorted(listed)
        assert set(np.flatnonzero(seen[i])) <= set(listed)


def test_blocks_above_the_diagonal_and_of_other_documents_are_left_out():
    places = Places(*(as_blocks(x, 8) for x in in_order(3, 40)))
    assert find_blocks(places, places)[1].tolist() == [1, 2, 3, 4, 5]
    places = Places(*(as_blocks(x, 8) for x in packed([[16, 8, 8]], 40)))
    order, count = find_blocks(places, places)
    assert count.tolist() == [1, 2, 1, 1, 0]
    assert [order[i, : count[i]].tolist() for i in range(5)] == [[0], [0, 1], [2], [3], []]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients(backend):
    q, k, v = normal(0, 1, 6, 2, 4) * 100, normal(1, 1, 6, 2, 4) * 100, normal(2, 1, 6, 2, 4)
    positions, _ = in_order(1, 6)
    segments = jnp.array([[1, 1, 0, 3, 0, 0]], jnp.int32)
    k_segments = jnp.array([[1, 1, 0, 2, 2, 0]], jnp.int32)
    places = {
        "q_positions": positions,
        "k_positions": positions,
        "q_segments": segments,
        "k_segments": k_segments,
    }
    out, gradients = value_and_gradients(
        q, k, v, {}, np.ones_like(q), places, backend=backend, block=2
    )
    assert np.all(np.asarray(out[:, 2:]) == 0) and np.abs(out[:, :2]).min() > 0
    for gradient in gradients[:3]:
        assert np.isfinite(gradient).all()
        assert np.all(np.asarray(gradient[:, 2:]) == 0)


def test_grouped_queries_read_their_head():
    q, k, v, places, block = arrays("packed and padded, grouped")
    grouped = attend(q, k, v, **places, block=block)
    repeated = attend(q, np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2), **places, block=block)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_to_float32_and_keeps_its_dtype():
    name = "packed and padded, grouped"
    q, k, v, places, block = arrays(name)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, normal(3, *q.shape))]
    out, gradients = value_and_gradients(
        *low[:3], {}, low[3], places, backend="chunked", block=block
    )
    exact, exact_gradients = run(name, "chunked", biased=False)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)
    for mine, theirs in zip(gradients[:3], exact_gradients[:3], strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=0.05, atol=0.1)


def test_memory_of_chunked_is_linear_and_of_reference_quadratic():
    def temporary_bytes(length, backend, transform):
        def total(q, positions, segments):
            return attention.attend(
                q,
                q,
                q,
                q_positions=positions,
                k_positions=positions,
                q_segments=segments,
                k_segments=segments,
                bias_fn=bias_fn,
                bias_variables=bias_variables(2),
                backend=backend,
                block=64,
            ).sum()

        shapes = (
            jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
        )
        compiled = jax.jit(transform(total)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 1024, 4096
    one_score_matrix = 4 * long * long
    linear = temporary_bytes(long, "chunked", jax.grad)
    assert linear < 4.5 * temporary_bytes(short, "chunked", jax.grad)
    assert linear < one_score_matrix / 4
    quadratic = temporary_bytes(long, "reference", lambda f: f)
    assert quadratic > 10 * temporary_bytes(short, "reference", lambda f: f)
    assert quadratic > 2 * one_score_matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flash"}, r"backend='flash': expected one of chunked, reference"),
        ({"block": 0}, r"block=0: expected 1 or more"),
        ({"v": jnp.zeros((1, 4, 1, 4))}, r"v \(1, 4, 1, 4\).*N a multiple of K"),
        ({"q": jnp.zeros((1, 4, 3, 4))}, r"q \(1, 4, 3, 4\), k \(1, 4, 2, 4\)"),
    ],
)
def test_bad_input_is_named(change, message):
    positions, segments = in_order(1, 4)
    arguments = {name: jnp.zeros((1, 4, 2, 4)) for name in "qkv"} | {
        "q_positions": positions,
        "k_positions": positions,
        "q_segments": segments,
        "k_segments": segments,
    }
    with pytest.raises(ValueError, match=message):
        attention.attend(**(arguments | change))
