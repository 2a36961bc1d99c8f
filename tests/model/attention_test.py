import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fope_jax.gallery.examples import EXAMPLES
from fope_jax.model import attention
from fope_jax.model.masks import TokenIndex, attention_mask, visible_key_blocks
from fope_jax.model.running_sums import running_sums
from fope_jax.position import ALiBi
from fope_jax.position.base import ModelShape, bias_of_heads, has_hook
from tests.model.rows import packed

attend = jax.jit(attention.attend, static_argnames=("bias_fn", "contextual_fn", "backend", "block"))
compiled_sums = jax.jit(running_sums)


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


def contextual_fn(variables, q, logits):
    """A bias by how far the running count of open gates is: it depends on the order of the keys."""
    gates = jax.nn.sigmoid(logits)
    count = jnp.cumsum(gates, axis=-1)
    slope = jnp.einsum("btnh,h->bnt", q, variables["direction"])[..., None]
    return variables["gain"][None, :, None, None] * jnp.sin(slope + count * variables["fixed"])


def contextual_variables(num_heads, head_dim):
    return {
        "direction": normal(9, head_dim) / 2,
        "gain": normal(10, num_heads) + 1.5,
        "fixed": np.float32(0.3),
    }


def in_order(batch, length):
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return positions, np.ones((batch, length), np.int32)


def oracle(q, k, v, q_positions, k_positions, q_segments, k_segments, bias=None, contextual=None):
    """Attention one query at a time, in float64; ``contextual`` are the variables of its bias."""
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
                if contextual is not None:
                    order = np.argsort(k_positions[b, keys], kind="stable")
                    count = np.empty(len(keys))
                    count[order] = np.cumsum(1 / (1 + np.exp(-logits[order])))
                    slope = q[b, t, n] @ contextual["direction"]
                    logits = logits + contextual["gain"][n] * np.sin(slope + 0.3 * count)
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
    batch, heads, kv_heads, head_dim, block, q_index, k_index = CASES[name]
    q = normal(0, batch, q_index[0].shape[1], heads, head_dim) * 2
    k = normal(1, batch, k_index[0].shape[1], kv_heads, head_dim) * 2
    v = normal(2, batch, k_index[0].shape[1], kv_heads, head_dim)
    places = {
        "q_positions": q_index[0],
        "q_segments": q_index[1],
        "k_positions": k_index[0],
        "k_segments": k_index[1],
    }
    return q, k, v, places, block


@functools.partial(jax.jit, static_argnames=("bias_fn", "contextual_fn", "backend", "block"))
def value_and_gradients(
    q, k, v, variables, cotangent, places, *, bias_fn=None, contextual_fn=None, backend, block=1
):
    """The output and the gradients of q, k, v and of the floating variables but ``"fixed"``."""

    def has_gradient(name):
        return name != "fixed" and jnp.issubdtype(variables[name].dtype, jnp.floating)

    trained = {name: x for name, x in variables.items() if has_gradient(name)}
    constants = {name: x for name, x in variables.items() if not has_gradient(name)}

    def attended(q, k, v, trained):
        return attention.attend(
            q,
            k,
            v,
            **places,
            bias_fn=bias_fn,
            contextual_fn=contextual_fn,
            bias_variables=trained,
            bias_constants=constants,
            backend=backend,
            block=block,
        )

    out, pull = jax.vjp(attended, q, k, v, trained)
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


@pytest.mark.fast("packed and padded, grouped", "stored in any order")
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    q, k, v, places, _ = arrays(name)
    bias = bias_fn(bias_variables(q.shape[2]), places["q_positions"], places["k_positions"])
    out, _ = run(name, "reference")
    np.testing.assert_allclose(out, oracle(q, k, v, **places, bias=bias), rtol=1e-5, atol=2e-6)


@pytest.mark.fast("packed and padded, grouped-True", "stored in any order-True")
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


def contextual_definition(name):
    """Of a contextual bias on top of ``bias_fn``, which its logits include."""
    q, k, v, places, _ = arrays(name)
    bias = bias_fn(bias_variables(q.shape[2]), places["q_positions"], places["k_positions"])
    contextual = contextual_variables(*q.shape[2:])
    return oracle(q, k, v, **places, bias=bias, contextual=contextual)


WITH_GRADIENTS = ("blocks that do not divide", "stored in any order")


def test_attention_inside_the_shard_map_of_a_caller():
    """Arrays that differ along other mesh axes than the rest, with their gradients."""
    mesh = jax.make_mesh((1, 1), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, k = normal(0, 3, 9, 4, 4), normal(1, 3, 9, 2, 4)
    v, slopes = normal(2, 3, 9, 2, 4), jnp.array([0.5, 0.25, 0.125, 0.0625])
    positions = jnp.arange(9)[None]

    def attend(q, k, v, slopes):
        return attention.attend(
            *(q, k, v),
            **dict.fromkeys(("q_positions", "k_positions"), positions),
            **dict.fromkeys(("q_segments", "k_segments"), jnp.ones_like(positions)),
            bias_fn=functools.partial(bias_of_heads, ALiBi()),
            bias_variables={"slopes": slopes},
            block=4,
        )

    P = jax.sharding.PartitionSpec
    by_both = P("rows", None, "heads")
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(by_both, by_both, by_both, P("heads")), out_specs=by_both
    )

    def values(attend):
        def loss(*arrays):
            return jnp.sum(attend(*arrays) ** 2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, slopes)

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        *(values(attend), values(mapped)),
    )


@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 0), (2, 0, 5), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("contextual", [False, True])
def test_no_rows_no_queries_and_no_keys(sizes, backend, contextual):
    batch, length, keys = sizes
    q, k, v = (
        np.ones((batch, tokens, heads, 4), np.float32)
        for tokens, heads in ((length, 4), (keys, 2), (keys, 2))
    )
    out = attend(
        *(q, k, v),
        q_positions=np.arange(length, dtype=np.int32)[None],
        k_positions=np.arange(keys, dtype=np.int32)[None],
        q_segments=np.ones((1, length), np.int32),
        k_segments=np.ones((1, keys), np.int32),
        contextual_fn=contextual_fn if contextual else None,
        bias_variables=contextual_variables(4, 4) if contextual else None,
        q_sums=compiled_sums(np.ones((batch, length, 4), np.float32)),
        k_sums=compiled_sums(np.ones((batch, keys, 4), np.float32)),
        backend=backend,
        block=4,
    )
    np.testing.assert_array_equal(out, np.zeros((batch, length, 4, 4)))


@pytest.mark.fast("packed and padded, grouped-chunked")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in WITH_GRADIENTS])
def test_a_contextual_bias_is_its_definition(name, backend):
    q, k, v, places, block = arrays(name)
    out = attend(
        q,
        k,
        v,
        **places,
        bias_fn=bias_fn,
        contextual_fn=contextual_fn,
        bias_constants=bias_variables(q.shape[2]) | contextual_variables(*q.shape[2:]),
        backend=backend,
        block=block,
    )
    np.testing.assert_allclose(out, contextual_definition(name), rtol=1e-4, atol=1e-5)


@pytest.mark.fast("stored in any order")
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_contextual_rows_in_blocks_have_the_gradients_of_the_reference(name):
    q, k, v, places, block = arrays(name)
    variables = bias_variables(q.shape[2]) | contextual_variables(*q.shape[2:])
    both = functools.partial(
        value_and_gradients,
        q,
        k,
        v,
        variables,
        normal(3, *q.shape),
        places,
        bias_fn=bias_fn,
        contextual_fn=contextual_fn,
    )
    chunked, reference = both(backend="chunked", block=block), both(backend="reference")
    assert_same(chunked, reference)
    for out, _ in (chunked, reference):
        np.testing.assert_allclose(out, contextual_definition(name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_of_rows_shrink_so_that_their_scores_fit(monkeypatch):
    q, k, v, places, _ = arrays("blocks that do not divide")
    shapes = []

    def recorder(variables, q, logits):
        shapes.append(logits.shape)
        return jnp.zeros_like(logits)

    monkeypatch.setattr(attention, "_SCORES_IN_ROWS", 5 * 37)
    out = attention.attend(q, k, v, **places, contextual_fn=recorder, block=16)
    assert shapes == [(2, 4, 5, 37)]
    np.testing.assert_allclose(out, attend(q, k, v, **places), rtol=1e-5, atol=1e-6)


def assert_same(mine, theirs, rtol=1e-5, atol=2e-5):
    """Leaf by leaf, none of them nothing; ``atol`` is a share of a leaf's largest number."""
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        largest = np.abs(y).max()
        assert largest > 1e-3
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol * max(1.0, largest))


@pytest.mark.fast("chunked-True")
@pytest.mark.parametrize("contextual", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_places_that_all_rows_share_may_be_given_once(backend, contextual):
    q, k, v, _, _ = arrays("packed and padded, grouped")
    positions, segments = (x[:1] for x in DOCUMENTS)
    variables = bias_variables(6) | (contextual_variables(6, 4) if contextual else {})
    used = {"bias_fn": bias_fn, "contextual_fn": contextual_fn if contextual else None}

    def attended(positions, segments):
        places = {
            "q_positions": positions,
            "k_positions": positions,
            "q_segments": segments,
            "k_segments": segments,
        }
        cotangent = normal(3, *q.shape)
        return value_and_gradients(
            q, k, v, variables, cotangent, places, **used, backend=backend, block=16
        )

    def rows(x):
        return np.repeat(x, 3, axis=0)

    expected = attended(rows(positions), rows(segments))
    assert_same(attended(positions, segments), expected)
    assert_same(attended(positions, rows(segments)), expected)


def test_a_bias_of_places_shared_by_all_rows_has_one_row():
    seen = []

    def recorder(variables, q_positions, k_positions):
        seen.append((q_positions.shape, k_positions.shape))
        return jnp.zeros((1, 2, q_positions.shape[1], k_positions.shape[1]))

    q = normal(0, 3, 20, 2, 4)
    positions, segments = in_order(1, 20)
    places = dict.fromkeys(("q_positions", "k_positions"), positions)
    places |= dict.fromkeys(("q_segments", "k_segments"), segments)
    jax.eval_shape(
        functools.partial(attention.attend, **places, bias_fn=recorder, block=5), q, q, q
    )
    assert set(seen) == {((1, 5), (1, 5))}


@pytest.mark.fast("chunked")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_constants_have_no_gradient_whatever_their_dtype(backend):
    q, k, v, places, block = arrays("packed and padded, grouped")
    variables = bias_variables(6)
    furthest, power = variables.pop("furthest"), variables.pop("power")

    def total(rate, power):
        out = attention.attend(
            q,
            k,
            v,
            **places,
            bias_fn=bias_fn,
            bias_variables={"rate": rate},
            bias_constants={"power": power, "furthest": furthest},
            backend=backend,
            block=block,
        )
        return (out * normal(3, *q.shape)).sum()

    d_rate, d_power = jax.jit(jax.grad(total, (0, 1)))(variables["rate"], power)
    assert np.abs(d_rate).max() > 1e-3
    assert np.all(np.asarray(d_power) == 0)


# Queries, keys, key-value heads, query heads to each, block: each is compiled.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(23, 17, 2, 2, 4), (9, 4, 1, 3, 7)], ids=str)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**16), num_segments=st.integers(0, 3), furthest=st.integers(0, 40)
)
def test_chunked_equals_reference_for_any_layout(sizes, seed, num_segments, furthest):
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


find_blocks = jax.jit(visible_key_blocks)


@jax.jit
def any_visible(q_index, k_index):
    return jax.vmap(lambda q: jax.vmap(lambda k: attention_mask(q, k).any())(k_index))(q_index)


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
    q_index = TokenIndex(as_blocks(positions, 4), as_blocks(segments, 4))
    k_index = TokenIndex(as_blocks(positions, 3), as_blocks(segments, 3))
    order, count = (np.asarray(x) for x in find_blocks(q_index, k_index))
    seen = np.asarray(any_visible(q_index, k_index))
    for i in range(6):
        listed = order[i, : count[i]].tolist()
        assert sorted(order[i].tolist()) == list(range(8)) and listed == sorted(listed)
        assert set(np.flatnonzero(seen[i])) <= set(listed)


def test_blocks_above_the_diagonal_and_of_other_documents_are_left_out():
    places = TokenIndex(*(as_blocks(x, 8) for x in in_order(3, 40)))
    assert find_blocks(places, places)[1].tolist() == [1, 2, 3, 4, 5]
    places = TokenIndex(*(as_blocks(x, 8) for x in packed([[16, 8, 8]], 40)))
    order, count = find_blocks(places, places)
    assert count.tolist() == [1, 2, 1, 1, 0]
    assert [order[i, : count[i]].tolist() for i in range(5)] == [[0], [0, 1], [2], [3], []]


@pytest.mark.fast("chunked-True")
@pytest.mark.parametrize("contextual", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_query_that_sees_no_key_gives_zeros_and_finite_gradients(backend, contextual):
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
        q,
        k,
        v,
        contextual_variables(2, 4) if contextual else {},
        np.ones_like(q),
        places,
        contextual_fn=contextual_fn if contextual else None,
        backend=backend,
        block=2,
    )
    assert np.all(np.asarray(out[:, 2:]) == 0) and np.abs(out[:, :2]).min() > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    for gradient in gradients[:3]:
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


SAME_ALONG = {
    "rows and heads": lambda q_positions, k_positions: (q_positions[:1], k_positions[:1]),
    "heads and queries": lambda q_positions, k_positions: (q_positions[:, :1] * 0, k_positions),
    "heads and keys": lambda q_positions, k_positions: (q_positions, k_positions[:, :1] * 0 + 3),
}


@pytest.mark.fast("heads and queries-chunked")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("axes", SAME_ALONG)
def test_a_bias_may_be_the_same_along_any_axis(axes, backend):
    """Its value and its gradients are those of the bias written out for every head and pair."""
    batch, length, heads = 2, 11, 4
    q, k, v = normal(0, batch, length, heads, 4), *normal(1, 2, batch, length, 2, 4)
    positions, segments = in_order(batch, length)
    places = dict.fromkeys(("q_positions", "k_positions"), positions)
    places |= dict.fromkeys(("q_segments", "k_segments"), segments)

    def same(variables, q_positions, k_positions):
        q_positions, k_positions = SAME_ALONG[axes](q_positions, k_positions)
        distance = q_positions[:, None, :, None] - k_positions[:, None, None, :]
        return -jnp.log1p(variables["rate"] * jnp.abs(distance).astype(jnp.float32))

    def written_out(variables, q_positions, k_positions):
        shape = (batch, heads, q_positions.shape[1], k_positions.shape[1])
        return jnp.broadcast_to(same(variables, q_positions, k_positions), shape)

    both = functools.partial(
        value_and_gradients,
        q,
        k,
        v,
        {"rate": np.float32(0.7)},
        normal(3, *q.shape),
        places,
        backend=backend,
        block=4,
    )
    out, gradients = both(bias_fn=same)
    expected, expected_gradients = both(bias_fn=written_out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


def test_a_contextual_bias_may_be_the_same_for_all_heads():
    q, k, v, places, block = arrays("blocks that do not divide")

    def first_head(variables, q, logits):
        return contextual_fn(variables, q, logits)[:, :1]

    def written_out(variables, q, logits):
        return jnp.broadcast_to(first_head(variables, q, logits), logits.shape)

    def run(contextual_fn):
        return jax.jit(
            functools.partial(
                attention.attend,
                **places,
                contextual_fn=contextual_fn,
                block=block,
                bias_variables=contextual_variables(4, 8),
            )
        )(q, k, v)

    np.testing.assert_allclose(run(first_head), run(written_out), rtol=1e-6, atol=1e-6)


@pytest.mark.fast("chunked-shape0", "reference-shape1")
@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (1, 1, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_bias_of_another_shape_is_named(shape, backend):
    q, (positions, segments) = normal(0, 3, 5, 4, 8), in_order(3, 5)
    places = dict.fromkeys(("q_positions", "k_positions"), positions)
    places |= dict.fromkeys(("q_segments", "k_segments"), segments)
    with pytest.raises(ValueError, match=r"a bias \(.*for logits \[B, N, T, S\] = \(3, 4, 5, 5\)"):
        attend(q, q, q, **places, bias_fn=lambda *_: jnp.zeros(shape), backend=backend)


def test_scores_of_contextual_methods_go_by_positions_not_by_storage():
    """Logits of tokens stored in another order are those logits in that order."""
    positions, segments = packed([[9, 7]], 16)
    q, k = normal(0, 1, 16, 4, 8), normal(1, 1, 16, 2, 8)
    order = np.random.default_rng(3).permutation(16)
    scores = functools.partial(
        attention.attention_logits,
        variables=contextual_variables(4, 8),
        contextual_fn=contextual_fn,
    )
    scores = jax.jit(scores)
    stored = scores(q, k, positions=positions, segments=segments)
    moved = scores(
        q[:, order], k[:, order], positions=positions[:, order], segments=segments[:, order]
    )
    np.testing.assert_allclose(moved, stored[:, :, order][..., order], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_all_derivatives_of_the_default_attention():
    """Forward mode against the gradient, and second derivatives both ways round."""
    q, k, v, places, block = arrays("packed and padded, grouped")
    variables = {name: x for name, x in bias_variables(6).items() if name != "furthest"}

    def total(arrays, derivatives="all", backend="chunked"):
        out = attention.attend(
            *arrays[:3],
            **places,
            bias_fn=bias_fn,
            bias_variables=arrays[3],
            bias_constants={"furthest": np.int32(20)},
            derivatives=derivatives,
            backend=backend,
            block=block,
        )
        return jnp.sum(jnp.sin(out))

    point = (q, k, v, variables)
    direction = jax.tree.map(lambda x: normal(x.size, *x.shape), point)

    @jax.jit
    def run(point, direction):
        def along(f):
            return jax.jvp(f, (point,), (direction,))[1]

        def slope(point):
            return jax.jvp(total, (point,), (direction,))[1]

        gradient = jax.grad(functools.partial(total, derivatives="reverse"))(point)
        return along(total), gradient, along(jax.grad(total)), jax.grad(slope)(point)

    slope, gradient, forward_over_reverse, reverse_over_forward = run(point, direction)
    expected = sum(
        np.vdot(x, y)
        for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
    assert_same(forward_over_reverse, reverse_over_forward, rtol=1e-4, atol=1e-5)


def test_unknown_derivatives_are_named():
    q, (positions, segments) = normal(0, 1, 5, 4, 8), in_order(1, 5)
    with pytest.raises(ValueError, match="derivatives='forward': expected one of reverse, all"):
        attention.attend(
            q,
            q,
            q,
            q_positions=positions,
            k_positions=positions,
            q_segments=segments,
            k_segments=segments,
            derivatives="forward",
        )


# ---------------------------------------------------------------------------- every method

BIASES = {
    label: method
    for label, method in EXAMPLES.items()
    if method.kind in ("bias", "contextual") and not has_hook(method, "running_bias")
}


def biased(label, num_heads, head_dim):
    """Functions of a method, its trained variables off their initial values, and its constants."""
    method = BIASES[label]
    owned = method.init(
        jax.random.key(0), ModelShape(num_heads * head_dim, 1, num_heads, 1, head_dim)
    )
    rng = np.random.default_rng(5)
    trained = {**owned.model_params, **{n: x[0] for n, x in owned.layer_params.items()}}
    trained = {
        name: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32)
        for name, x in trained.items()
    }
    constants = {**owned.model_constants, **{n: x[0] for n, x in owned.layer_constants.items()}}
    return attention.layer_arguments(method.layers()[0]), trained, constants


def test_every_kind_of_bias_is_among_the_examples():
    assert {"alibi", "t5", "kerple", "fire", "cope"} <= BIASES.keys()


@pytest.mark.fast("fire-False", "cope-True")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("label", BIASES)
def test_every_bias_in_blocks_equals_its_reference(label, shared):
    """Packed and grouped, or places given once; blocks that do not divide the length."""
    functions, trained, constants = biased(label, 6, 4)
    q, k, v, places, block = arrays("packed and padded, grouped")
    if shared:
        places = {name: x[:1] for name, x in places.items()}
    cotangent = normal(3, *q.shape)

    def run(backend):
        def attended(q, k, v, trained):
            return attention.attend(
                q,
                k,
                v,
                **places,
                **functions,
                bias_variables=trained,
                bias_constants=constants,
                backend=backend,
                block=block,
            )

        out, pull = jax.vjp(attended, q, k, v, trained)
        return out, pull(cotangent)

    (out, gradients), (expected, expected_gradients) = (
        jax.jit(run, static_argnums=0)(backend) for backend in ("chunked", "reference")
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert gradients[3].keys() == trained.keys()
    for name, gradient in gradients[3].items():
        # The softmax is blind to what all keys of a row share.
        blind = name in ("out_bias",) or (label == "fire" and name == "length_factor")
        assert blind or np.abs(gradient).max() > 1e-3, name
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=5e-5 * max(1.0, np.abs(y).max()))


@pytest.mark.slow
@pytest.mark.fast("cope")
@pytest.mark.parametrize("label", BIASES)
def test_the_memory_of_every_bias_grows_with_the_length_and_not_its_square(label):
    """Forward and backward, B = 1, N = 2, H = 16, compiled and not run."""
    functions, trained, constants = biased(label, 2, 16)

    def temporary_bytes(length):
        def total(q, k, v, trained, places):
            return attention.attend(
                q, k, v, **places, **functions, bias_variables=trained, bias_constants=constants
            ).sum()

        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        names = ("q_positions", "k_positions", "q_segments", "k_segments")
        places = dict.fromkeys(names, jax.ShapeDtypeStruct((1, length), jnp.int32))
        compiled = jax.jit(jax.grad(total, (0, 1, 2, 3))).lower(x, x, x, trained, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = (temporary_bytes(length) for length in (4096, 65_536))
    assert long < 16 * 1.1 * short
    one_score_tensor = 4 * 2 * 65_536**2
    width = 32 if label == "dape" else 1  # numbers that its network has for each pair of tokens
    assert long < width * one_score_tensor / 50


@pytest.mark.slow
def test_memory_of_chunked_is_linear_and_of_reference_quadratic():
    variables = bias_variables(2)
    furthest = variables.pop("furthest")

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
                bias_variables=variables,
                bias_constants={"furthest": furthest},
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
        (
            {"q_segments": np.ones((2, 4), np.int32)},
            r"q_segments \(2, 4\): expected \(1, 4\), or \(1, 4\) where all rows share them",
        ),
        ({"k_positions": np.ones((1, 3), np.int32)}, r"k_positions \(1, 3\): expected \(1, 4\)"),
        (
            {"bias_variables": {"bucket": np.zeros(3, np.int32)}},
            r"bias_variables\['bucket'\] is int32: .*pass others as bias_constants",
        ),
        (
            {"bias_variables": {"a": np.ones(1, np.float32)}, "bias_constants": {"a": 1.0}},
            r"bias_variables and bias_constants both hold \['a'\]",
        ),
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
