"""CoPE: another implementation's numbers, float64 formulas, gradients and what must hold."""

import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.position.base import ModelShape, has_hook
from fope_jax.position.contextual import CoPE, contextual_positions, cope_bias

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "peers_rope.npz")
SHAPE = ModelShape(d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12)
METHODS = {
    "shared": CoPE(max_position=7, init_std=0.8),
    "own-tables": CoPE(max_position=7, init_std=0.8, share_heads=False),
}


def every_method(test):
    return pytest.mark.parametrize("name", METHODS)(test)


def table_of(method, layer=1):
    return method.init(jax.random.key(0), SHAPE).layer_params["position_table"][layer]


def inputs(batch=2, length=11, keys=11, heads=4, head_dim=12, seed=0):
    """q ``[B, T, N, H]`` and causal logits ``[B, N, T, S]``: queries are the last of the keys."""
    random = np.random.default_rng(seed)
    q = random.normal(size=(batch, length, heads, head_dim)).astype(np.float32)
    logits = random.normal(size=(batch, heads, length, keys)).astype(np.float32)
    return q, np.where(np.tri(length, keys, keys - length, dtype=bool), logits, -np.inf)


def plain_bias(q, logits, table):
    """Element by element in float64: interpolated embeddings first, then the product with q."""
    q, logits, table = (np.asarray(x, np.float64) for x in (q, logits, table))
    batch, length, heads, _ = q.shape
    last = table.shape[-2] - 1
    gates = 1 / (1 + np.exp(-logits))
    bias = np.zeros(logits.shape)
    for b, n, t in np.ndindex(batch, heads, length):
        rows = table if table.ndim == 2 else table[n]
        position = 0.0
        for s in reversed(range(logits.shape[-1])):
            position += gates[b, n, t, s]
            p = min(position, last)
            low, high = math.floor(p), math.ceil(p)
            embedding = (
                rows[low] if low == high else (high - p) * rows[low] + (p - low) * rows[high]
            )
            bias[b, n, t, s] = q[b, t, n] @ embedding
    return bias


# Of x-transformers 2.31.10, for q and logits of the golden file, a causal mask and PEER_TABLE: the
# golden file's own table is all zero, and so is its bias. Head 1, queries 7 and 19.
PEER_TABLE = np.sin(0.7 * np.arange(12)[:, None] + 0.3 * np.arange(16)[None] ** 1.5)
PEER_7 = [-1.80486, -2.65807, -2.83505, -3.00024, -2.91252, -2.52887, -1.64396, -0.78825] + [
    -0.06798
] * 12
PEER_19 = [-4.58808, -4.96555, -4.37625, -3.14787, -2.33356, -0.27442, 1.59115, 3.22068, 4.32679]
PEER_19 += [4.99504, 4.91614, 4.63099, 3.88189, 2.7845, 1.0213, 0.63848, -1.60613, -3.86381]
PEER_19 += [-4.62872, -4.93786]


def test_numbers_of_another_implementation():
    """The query is unscaled there: with q / sqrt(H) numbers would differ by several logits."""
    q = jnp.swapaxes(jnp.asarray(GOLDENS["cope/q"]), 1, 2)
    logits = jnp.where(np.tri(20, dtype=bool), GOLDENS["cope/attn_logits"], -jnp.inf)
    bias = cope_bias(q, logits, jnp.asarray(PEER_TABLE, jnp.float32))
    np.testing.assert_allclose(bias[0, 1, 7], PEER_7, atol=1.5e-5)
    np.testing.assert_allclose(bias[0, 1, 19], PEER_19, atol=1.5e-5)


def test_the_golden_table_of_zeros_gives_no_bias():
    q = jnp.swapaxes(jnp.asarray(GOLDENS["cope/q"]), 1, 2)
    bias = cope_bias(q, GOLDENS["cope/attn_logits"], GOLDENS["cope/pos_emb"])
    np.testing.assert_array_equal(bias, GOLDENS["cope/bias"])


@pytest.mark.fast("own-tables")
@every_method
def test_values_against_float64(name):
    q, logits = inputs()
    table = table_of(METHODS[name])
    bias = METHODS[name].contextual_bias({"position_table": table}, q, logits)
    expected = plain_bias(q, logits, table)
    assert bias.dtype == jnp.float32
    np.testing.assert_allclose(bias, expected, rtol=1e-5, atol=1e-5)
    # Rows that count to the last position, and rows that do not.
    counts = contextual_positions(logits, 7)
    assert (counts == 6).any() and (counts[..., -1, :] < 6).any()


@every_method
def test_open_gates_count_tokens(name):
    """Logits of 40: bias[i, j] is q_i . e[min(i - j + 1, P - 1)], relative positions."""
    q, logits = inputs()
    table = table_of(METHODS[name])
    bias = cope_bias(q, np.where(np.isinf(logits), logits, 40.0), table)
    i, j = np.indices((11, 11))
    rows = np.broadcast_to(table, (4, 7, 12))[:, np.clip(i - j + 1, 0, 6)]
    expected = np.einsum("btnh,ntsh->bnts", q, rows)
    np.testing.assert_allclose(bias, expected, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_counts_nothing():
    """Only every third key has an open gate: the position is the number of those passed."""
    gates = np.where(np.arange(12) % 3 == 0, 60.0, -60.0).astype(np.float32)
    counted = contextual_positions(jnp.asarray(gates), 64)
    np.testing.assert_allclose(counted, [4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0], atol=1e-6)


@pytest.mark.slow  # common_test decodes every method
@every_method
def test_one_query_has_its_row_of_the_whole(name):
    """Decoding: keys after the query are absent there and at -inf in the full pass."""
    q, logits = inputs()
    table = table_of(METHODS[name])
    full = cope_bias(q, logits, table)
    for t in (0, 4, 10):
        one = cope_bias(q[:, t : t + 1], logits[:, :, t : t + 1, : t + 1], table)
        np.testing.assert_allclose(one[:, :, 0], full[:, :, t, : t + 1], rtol=1e-5, atol=2e-6)


@pytest.mark.slow  # common_test has it for every method
@every_method
def test_packed_equals_separate(name):
    """Keys of another segment are at -inf: they count for nothing, before or after."""
    q, _ = inputs(length=18)
    _, logits = inputs(length=18, keys=18, seed=4)
    segments = np.repeat([1, 2], [7, 11])
    logits = np.where(segments[:, None] == segments[None, :], logits, -np.inf)
    table = table_of(METHODS[name])
    together = cope_bias(q, logits, table)
    for rows in (slice(0, 7), slice(7, 18)):
        alone = cope_bias(q[:, rows], logits[..., rows, rows], table)
        np.testing.assert_allclose(together[..., rows, rows], alone, rtol=1e-5, atol=2e-6)


@pytest.mark.fast("own-tables")
@every_method
def test_finite_with_gradients_wherever_masked(name):
    """A padding query that sees nothing, and gates at both ends of float32."""
    q, logits = inputs()
    logits = logits.copy()
    logits[0, :, 5] = -np.inf
    logits[1, 0] = np.where(np.isinf(logits[1, 0]), -np.inf, 3e38)
    table = table_of(METHODS[name])
    bias = cope_bias(q, logits, table)
    assert np.isfinite(bias).all()
    gradient = jax.grad(lambda *parts: jnp.sum(jnp.sin(cope_bias(*parts))), argnums=(0, 1, 2))(
        jnp.asarray(q), jnp.asarray(logits), table
    )
    chex.assert_tree_all_finite(gradient)
    np.testing.assert_array_equal(np.asarray(gradient[1])[np.isinf(logits)], 0.0)


@pytest.mark.fast("own-tables")
@every_method
def test_gradients(name):
    """Of q, logits and the table against central differences of the float64 formula."""
    q, logits = inputs(batch=1, length=3, keys=9)
    table = table_of(METHODS[name])
    weight = np.random.default_rng(1).normal(size=logits.shape)

    def loss(q, logits, table):
        return jnp.sum(cope_bias(q, logits, table) * jnp.asarray(weight, jnp.float32))

    gradient = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(q), jnp.asarray(logits), table)
    parts = [np.asarray(x, np.float64) for x in (q, logits, table)]
    random = np.random.default_rng(3)
    for index, part in enumerate(parts):
        for _ in range(6):
            direction = random.normal(size=part.shape)
            moved = []
            for by in (1e-7, -1e-7):
                changed = list(parts)
                changed[index] = np.where(np.isinf(part), part, part + by * direction)
                moved.append(np.sum(weight * plain_bias(*changed)))
            slope = (moved[0] - moved[1]) / 2e-7
            ours = np.sum(np.asarray(gradient[index], np.float64) * direction)
            np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4)
        assert np.abs(gradient[index]).max() > 0.1


def test_beyond_the_last_position_nothing_depends_on_the_gates():
    q, logits = inputs(batch=1, length=1, keys=40)
    table = table_of(METHODS["shared"])
    far = slice(0, 15)  # 25 keys of gates about a half stand after these
    bias = cope_bias(q, logits, table)
    last = np.einsum("btnh,h->bnt", q, table[-1])
    np.testing.assert_allclose(bias[..., far], np.repeat(last[..., None], 15, -1), rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(cope_bias(q, x, table)[..., far]))(jnp.asarray(logits))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("keys", [65_536, 1_048_576])
def test_counts_over_many_keys(keys):
    """Nearly closed gates that add up to 40 positions: relative 1e-5 of the float64 sum."""
    random = np.random.default_rng(0)
    logits = (random.normal(size=keys) - math.log(keys / 25)).astype(np.float32)
    ours = np.asarray(jax.jit(contextual_positions, static_argnums=1)(logits, 2048), np.float64)
    expected = np.cumsum(1 / (1 + np.exp(-logits.astype(np.float64)))[::-1])[::-1]
    assert 30 < expected[0] < 60
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3, st.integers(0, 9)),
    max_position=st.integers(2, 9),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(sizes, max_position, own, seed):
    batch, length, heads, before = sizes
    q, logits = inputs(batch, length, length + before, heads, 6, seed)
    random = np.random.default_rng(seed)
    table = random.normal(size=((heads,) if own else ()) + (max_position, 6)).astype(np.float32)
    bias = cope_bias(q, logits, table)
    assert bias.shape == logits.shape
    np.testing.assert_allclose(bias, plain_bias(q, logits, table), rtol=1e-4, atol=2e-5)


@pytest.mark.fast("own-tables")
@every_method
def test_jit_vmap_and_bfloat16(name):
    q, logits = inputs()
    table = table_of(METHODS[name])
    plain = cope_bias(q, logits, table)
    mapped = jax.vmap(lambda q, x: cope_bias(q[None], x[None], table)[0])(q, logits)
    for other in (jax.jit(cope_bias)(q, logits, table), mapped):
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-5)
    half = jnp.asarray(q, jnp.bfloat16)
    bias = cope_bias(half, logits, table)
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, cope_bias(half.astype(jnp.float32), logits, table))


def largest_array(jaxpr):
    """Elements of the largest intermediate result, inner functions included."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [
        largest_array(getattr(value, "jaxpr", value))
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    return max(sizes + inner)


def test_nothing_is_as_large_as_scores_times_positions():
    """Neither forwards nor backwards: at most the scores and the products with embeddings."""
    q, logits = inputs(batch=1, length=32, keys=32)
    table = jnp.ones((24, 12))
    gradient = jax.grad(lambda *parts: jnp.sum(cope_bias(*parts)), argnums=(0, 1, 2))
    jaxpr = jax.make_jaxpr(gradient)(jnp.asarray(q), jnp.asarray(logits), table).jaxpr
    assert largest_array(jaxpr) == 4 * 32 * 32


@every_method
def test_everything_is_trained_a_layer(name):
    method = METHODS[name]
    one, same, other = (method.init(jax.random.key(seed), SHAPE) for seed in (0, 0, 1))
    assert list(one.layer_params) == ["position_table"]
    assert not (one.model_params or one.model_constants or one.layer_constants)
    table = one.layer_params["position_table"]
    assert table.shape == ((3, 7, 12) if method.share_heads else (3, 4, 7, 12))
    np.testing.assert_array_equal(table, same.layer_params["position_table"])
    assert not np.array_equal(table, other.layer_params["position_table"])
    np.testing.assert_allclose(np.std(table), 0.8, rtol=0.15)


def test_zero_is_where_it_starts_and_does_not_stay():
    """As in the authors' code; the gradient of the table is not zero there."""
    method = CoPE()
    table = method.init(jax.random.key(0), SHAPE).layer_params["position_table"][0]
    np.testing.assert_array_equal(table, np.zeros((64, 12)))
    q, logits = inputs()
    weight = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    gradient = jax.grad(lambda table: jnp.sum(weight * cope_bias(q, logits, table)))(table)
    assert np.abs(gradient[:5]).min() > 0


@every_method
def test_a_contextual_method_says_so(name):
    method = METHODS[name]
    assert (
        method.kind == "contextual"
        and has_hook(method, "contextual_bias")
        and not has_hook(method, "bias")
    )
    assert method.extends.startswith("yes")
    assert hash(method) == hash(CoPE(**vars(method)))
    method.check(SHAPE)


Q, LOGITS, TABLE = np.ones((2, 3, 4, 6)), np.ones((2, 4, 3, 5)), np.ones((7, 6))
ERRORS = {
    "one position": (lambda: CoPE(max_position=1), "max_position=1: .* must be 2 or more"),
    "init_std": (lambda: CoPE(init_std=-1.0), "init_std=-1.0: .*finite, 0 or more"),
    "no number": (lambda: CoPE(init_std=math.nan), "init_std=nan"),
    "axes of q": (
        lambda: cope_bias(Q[0], LOGITS, TABLE),
        r"q \(3, 4, 6\), logits \(2, 4, 3, 5\).*expected \[B, T, N, H\]",
    ),
    "heads before queries": (
        lambda: cope_bias(Q.swapaxes(1, 2), LOGITS, TABLE),
        r"q \(2, 4, 3, 6\), logits \(2, 4, 3, 5\)",
    ),
    "width of the table": (
        lambda: cope_bias(Q, LOGITS, np.ones((7, 5))),
        r"position_table \(7, 5\): expected",
    ),
    "heads of the table": (
        lambda: cope_bias(Q, LOGITS, np.ones((2, 7, 6))),
        r"position_table \(2, 7, 6\): .*\[N, P, H\]",
    ),
    "axes of the table": (lambda: cope_bias(Q, LOGITS, np.ones(6)), r"position_table \(6,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
