"""T5, KERPLE and FIRE: other people's numbers, float64 formulas, gradients and what must hold."""

import dataclasses
import functools
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fope_jax.model.attention import attend
from fope_jax.position.alibi import ALiBi, alibi_bias, alibi_slopes
from fope_jax.position.base import ModelShape, bias_of_heads, block_positions, has_hook
from fope_jax.position.relative_bias import (
    FIRE,
    Kerple,
    T5Bias,
    clamp_value,
    fire_distance,
    kerple_log_bias,
    kerple_power_bias,
    relative_distance,
    t5_bias,
    t5_buckets,
)

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "peers_rope.npz")
SHAPE = ModelShape(d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12)
FAR = 1_000_000
METHODS = {
    "t5": T5Bias(num_buckets=8, max_distance=24, init_std=0.7),
    "t5-layers": T5Bias(num_buckets=8, max_distance=24, share_layers=False),
    "t5-both": T5Bias(num_buckets=16, max_distance=24, init_std=0.7, bidirectional=True),
    "kerple-log": Kerple(),
    "kerple-power": Kerple(form="power"),
    "fire": FIRE(init_length=20.0),
    "fire-shared": FIRE(init_length=20.0, share_layers=True, mlp_width=5),
}
RELATIVE = [name for name in METHODS if not name.startswith("fire")]


def every_method(test):
    return pytest.mark.parametrize("name", METHODS)(test)


# One program for a block: run eagerly, each of some twenty operations is compiled for a new shape.
block_bias = jax.jit(bias_of_heads, static_argnums=0)


@functools.cache
def variables_of(method, layer=1, seed=0):
    owned = method.init(jax.random.key(seed), SHAPE)
    return owned.model_params | {name: x[layer] for name, x in owned.layer_params.items()}


def row(*positions):
    return jnp.asarray([positions], jnp.int32)


def arange(length, start=0):
    return jnp.arange(start, start + length, dtype=jnp.int32)[None]


def wide(tree):
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


# --- independent evaluations in float64 -----------------------------------------------------------


def plain_buckets(distances, num_buckets, max_distance):
    exact = num_buckets // 2
    shares = np.log(np.maximum(distances, 1) / exact) / math.log(max_distance / exact)
    slots = np.floor(shares * (num_buckets - exact) + 1e-6).astype(int)
    return np.where(distances < exact, distances, np.minimum(num_buckets - 1, exact + slots))


def plain_block(method, variables, q_positions, k_positions):
    """``[B, N, T, S]`` float64: keys after the query by the size of their distance.

    T5's causal buckets have them at distance 0, its bidirectional ones in the second half.
    """
    v = wide(variables)
    i = np.asarray(q_positions, np.int64)[:, :, None]
    j = np.asarray(k_positions, np.int64)[:, None, :]
    if isinstance(method, T5Bias):
        if method.bidirectional:
            half = method.num_buckets // 2
            buckets = plain_buckets(np.abs(i - j), half, method.max_distance) + half * (j > i)
        else:
            buckets = plain_buckets(np.maximum(i - j, 0), method.num_buckets, method.max_distance)
        return np.moveaxis(v["bias_table"][buckets], -1, 1)
    far = np.abs(i - j)[..., None].astype(np.float64)
    if isinstance(method, Kerple):
        r1 = np.maximum(v["r1"], 0.01)
        if method.form == "log":
            out = -r1 * np.log(1 + np.maximum(v["r2"], 0.01) * far)
        else:
            out = -r1 * far ** np.clip(v["r2"], 0.01, 2)
        return np.moveaxis(out, -1, 1)
    threshold = abs(v["length_factor"] * method.init_length)
    c = abs(v["c"])
    last = np.maximum(np.maximum(i, j), threshold)
    share = np.log(c * far + 1) / (np.log(c * last + 1) + 1e-6)[..., None]
    hidden = np.maximum(share * v["hidden_weight"] + v["hidden_bias"], 0)
    return np.moveaxis(hidden @ v["out_weight"] + v["out_bias"], -1, 1)


def seen(q_positions, k_positions):
    return (np.asarray(relative_distance(*block_positions(q_positions, k_positions))) >= 0)[:, None]


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.fast(
    "70-t5",
    "70-fire",
    "1048576-t5",
    "1048576-t5-both",
    "1048576-kerple-log",
    "1048576-kerple-power",
    "1048576-fire",
)
@every_method
@pytest.mark.parametrize("end", [70, 5_000, 1_048_576])
def test_values_against_float64(name, end):
    """Relative 1e-5 at distances from 0 to the last position, queries near and far."""
    method = METHODS[name]
    variables = variables_of(method)
    steps = np.geomspace(1, end, 40).astype(np.int32)
    k_positions = np.concatenate([[0], steps])[None]
    q_positions = np.array([[0, 3, 21, end // 2, end - 1, end]])
    bias = np.asarray(block_bias(method, variables, q_positions, k_positions), np.float64)
    expected = plain_block(method, variables, q_positions, k_positions)
    assert bias.shape == (1, SHAPE.num_heads, 6, k_positions.shape[1])
    # FIRE's value is a sum of terms of both signs, so what is relative is its size.
    scale = np.abs(expected).max() if isinstance(method, FIRE) else 0.0
    np.testing.assert_allclose(bias, expected, rtol=1e-5, atol=1e-5 * scale + 1e-12)


@every_method
def test_keys_after_the_query_are_finite(name):
    method = METHODS[name]
    bias = block_bias(method, variables_of(method), row(0, 5), row(1, 9, 1_048_576))
    assert bias.dtype == jnp.float32 and np.isfinite(bias).all()


@pytest.mark.parametrize("name", [*METHODS, "alibi"])
def test_without_a_causal_mask_both_directions_are_alike(name):
    """A key after the query has the bias that the query has as a key of it; T5 tells them apart."""
    method = METHODS.get(name) or ALiBi()
    variables = {"slopes": alibi_slopes(4)} if name == "alibi" else variables_of(method)
    at = row(0, 1, 5, 19, 21, 40, 900)
    bias = np.asarray(block_bias(method, variables, at, at))
    same = np.abs(bias - bias.swapaxes(2, 3)).max() < 1e-6
    assert method.limits.needs_causal_mask == (name in ("t5", "t5-layers"))
    assert same == (not name.startswith("t5"))
    if name == "alibi":
        distance = np.abs(np.subtract.outer(np.asarray(at[0]), np.asarray(at[0])))
        right = -np.array([0.25, 0.0625, 0.015625, 0.00390625])[:, None, None] * distance
        np.testing.assert_allclose(bias[0], right, rtol=1e-6)


@pytest.mark.parametrize("name", RELATIVE)
def test_a_shift_by_a_million_changes_no_bit(name):
    method = METHODS[name]
    variables = variables_of(method)
    q, k = row(40, 77, 300), arange(300)
    here, there = (block_bias(method, variables, q + by, k + by) for by in (0, FAR))
    np.testing.assert_array_equal(here, there)
    assert len(np.unique(here)) > 20


@every_method
def test_gradient_of_every_parameter(name):
    """Against central differences of the float64 formula, at values moved off their start."""
    method = METHODS[name]
    random = np.random.default_rng(2)
    variables = {
        label: x + np.asarray(0.3 * random.uniform(0.2, 1.0, size=x.shape), np.float32)
        for label, x in variables_of(method).items()
    }
    q, k = np.array([[0, 7, 33, 61]]), np.arange(62, dtype=np.int32)[None]
    weight = random.normal(size=(1, SHAPE.num_heads, 4, 62)) * seen(q, k)

    def loss(variables):
        return jnp.sum(bias_of_heads(method, variables, q, k) * jnp.asarray(weight, jnp.float32))

    gradient = jax.jit(jax.grad(loss))(variables)
    chex.assert_tree_all_finite(gradient)
    for label, x in wide(variables).items():
        expected = np.zeros(x.shape)
        step = 1e-6
        for index in np.ndindex(x.shape):
            moved = []
            for by in (step, -step):
                changed = x.copy()
                changed[index] += by
                moved.append(plain_block(method, variables | {label: changed}, q, k))
            expected[index] = np.sum(weight * (moved[0] - moved[1])) / (2 * step)
        assert np.abs(expected).max() > 0.01, label
        np.testing.assert_allclose(
            gradient[label], expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max(), err_msg=label
        )


def attention_inputs(length, batch=2):
    random = np.random.default_rng(5)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    return [
        jnp.asarray(random.normal(size=(batch, length, n, SHAPE.head_dim)), jnp.float32)
        for n in heads
    ]


def run(method, variables, qkv, positions, segments, backend="reference"):
    return attend(
        *qkv,
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        bias_fn=functools.partial(bias_of_heads, method),
        bias_variables=variables,
        backend=backend,
        block=16,
    )


def packed_places(lengths, batch=2):
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    return [
        jnp.asarray(np.broadcast_to(x, (batch, len(x))), jnp.int32) for x in (positions, segments)
    ]


@pytest.mark.slow  # common_test has it for every method
@every_method
def test_packed_equals_separate(name):
    method = METHODS[name]
    variables = variables_of(method)
    lengths = (37, 21)
    qkv = attention_inputs(sum(lengths))
    together = run(method, variables, qkv, *packed_places(lengths))
    start = 0
    for length in lengths:
        part = [x[:, start : start + length] for x in qkv]
        alone = run(method, variables, part, *packed_places((length,)))
        np.testing.assert_allclose(together[:, start : start + length], alone, atol=2e-6)
        start += length


@pytest.mark.slow  # tests/model/attention_test.py has it
@every_method
def test_the_blockwise_path_gives_the_same_values_and_gradients(name):
    method = METHODS[name]
    qkv = attention_inputs(53)
    places = packed_places((30, 23))

    def loss(variables, backend):
        return jnp.sum(jnp.sin(run(method, variables, qkv, *places, backend=backend)))

    variables = variables_of(method)
    value, gradient = jax.value_and_grad(loss)(variables, "reference")
    blocks = jax.value_and_grad(loss)(variables, "chunked")
    np.testing.assert_allclose(blocks[0], value, rtol=1e-5)
    for label, expected in gradient.items():
        np.testing.assert_allclose(blocks[1][label], expected, rtol=1e-3, atol=2e-5, err_msg=label)
    moving = [label for label, x in gradient.items() if float(jnp.abs(x).max()) > 1e-4]
    assert set(gradient) - set(moving) <= {"out_bias"}  # a constant of all keys


@every_method
def test_everything_is_trained_and_drawn_from_the_key(name):
    method = METHODS[name]
    one, same, other = (method.init(jax.random.key(seed), SHAPE) for seed in (0, 0, 1))
    assert not one.model_constants and not one.layer_constants
    chex.assert_trees_all_equal(one, same)
    shared = getattr(method, "share_layers", False)
    assert bool(one.model_params) == shared and bool(one.layer_params) != shared
    for label in one.layer_params:
        layers = one.layer_params[label]
        assert layers.shape[0] == SHAPE.num_layers and layers.dtype == jnp.float32
        if label not in ("c", "length_factor"):
            assert not np.array_equal(layers, other.layer_params[label])
            assert not np.array_equal(layers[0], layers[1])
    for label in one.model_params:
        if label not in ("c", "length_factor"):
            assert not np.array_equal(one.model_params[label], other.model_params[label])


def is_the_formula_of_each_pair(method, sizes, shared, seed):
    """Of positions in any order; ``shared``: whether queries and keys have a batch axis of 1."""
    variables = variables_of(method, seed=seed)
    random = np.random.default_rng(seed)
    batch, length, keys = sizes
    q, k = (
        random.integers(0, 90, (1 if alone else batch, n)).astype(np.int32)
        for alone, n in zip(shared, (length, keys), strict=True)
    )
    bias = block_bias(method, variables, q, k)
    rows = 1 if all(shared) else batch
    assert bias.shape == (rows, SHAPE.num_heads, length, keys) and bias.dtype == jnp.float32
    expected = plain_block(method, variables, q, k)
    difference = np.abs(np.asarray(bias, np.float64) - expected)
    assert difference.max() < 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.slow
@every_method
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)),
    shared=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_block_of_any_shape(name, sizes, shared, seed):
    is_the_formula_of_each_pair(METHODS[name], sizes, shared, seed)


# --- T5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["bidir1_32_128", "bidir1_16_64", "bidir0_32_128", "bidir0_16_64"])
def test_t5_buckets_of_the_golden_numbers(case, compiled):
    bidirectional, num_buckets, max_distance = map(int, case.removeprefix("bidir").split("_"))

    def buckets(relative_position):
        return t5_buckets(
            relative_position,
            num_buckets=num_buckets,
            max_distance=max_distance,
            bidirectional=bool(bidirectional),
        )

    relative = jnp.asarray(GOLDENS["t5_bucket/relative_position"], jnp.int32)
    ours = jax.jit(buckets)(relative) if compiled else buckets(relative)
    np.testing.assert_array_equal(ours, GOLDENS[f"t5_bucket/{case}"])
    assert len(np.unique(ours)) == num_buckets - bidirectional  # no distance 0 after the query


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(num_buckets=st.integers(2, 70), span=st.integers(1, 5000))
def test_t5_buckets_by_whole_numbers(num_buckets, span):
    """Bucket e + k starts where (d / e) ** (n - e) reaches (max / e) ** k, checked in integers."""
    exact = num_buckets // 2
    max_distance = exact + span
    distances = np.geomspace(1, 2 * max_distance, 60).astype(np.int32)
    buckets = t5_buckets(-distances, num_buckets=num_buckets, max_distance=max_distance)
    wide_buckets = num_buckets - exact

    def reached(distance, k, slack):  # whether bucket e + k has started, give or take a millionth
        left = wide_buckets * math.log(distance / exact) + slack
        return left >= k * math.log(max_distance / exact)

    for distance, bucket in zip(distances.tolist(), np.asarray(buckets).tolist(), strict=True):
        if distance < exact:
            assert bucket == distance
            continue
        k = bucket - exact
        assert 0 <= k < wide_buckets
        assert reached(distance, k, 1e-6)
        assert k == wide_buckets - 1 or not reached(distance, k + 1, -1e-6)


def test_t5_edges_where_the_logarithm_is_a_whole_number():
    """Distances 8, 16, 32 start a bucket with 4 exact ones and 64 = 4 * 2 ** 4 as the farthest."""
    distances = np.array([3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65])
    buckets = t5_buckets(-distances, num_buckets=8, max_distance=64)
    np.testing.assert_array_equal(buckets, [3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7])


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (64, 4096), (2, 3), (9, 5)])
def test_t5_buckets_grow_and_saturate(num_buckets, max_distance):
    distances = np.concatenate([np.arange(3 * max_distance), [1_048_576, 2**31 - 1]])
    buckets = np.asarray(t5_buckets(-distances, num_buckets=num_buckets, max_distance=max_distance))
    assert (np.diff(buckets) >= 0).all()
    assert (buckets[max_distance:] == num_buckets - 1).all()
    exact = num_buckets // 2
    np.testing.assert_array_equal(buckets[: exact + 1], np.arange(exact + 1))


def test_t5_both_directions_mirror_each_other():
    before, after = (
        np.asarray(t5_buckets(sign * np.arange(1, 900), bidirectional=True)) for sign in (-1, 1)
    )
    np.testing.assert_array_equal(after, before + 16)
    half = t5_buckets(-np.arange(1, 900), num_buckets=16)
    np.testing.assert_array_equal(before, half)


def test_t5_table_starts_as_documented():
    """Uniform, with the standard deviation of variance scaling by the mean of the fans."""
    shape = SHAPE._replace(num_heads=16)
    method = T5Bias(num_buckets=512, max_distance=4096)
    table = np.asarray(method.init(jax.random.key(0), shape).model_params["bias_table"])
    assert table.shape == (512, 16)
    std = math.sqrt(2 / (512 + 16))
    np.testing.assert_allclose(table.std(), std, rtol=0.02)
    np.testing.assert_allclose(np.abs(table).max(), math.sqrt(3) * std, rtol=0.01)
    loud = dataclasses.replace(method, init_std=0.5).init(jax.random.key(0), shape)
    np.testing.assert_allclose(loud.model_params["bias_table"], table * (0.5 / std), rtol=1e-5)


# --- KERPLE ---------------------------------------------------------------------------------------


def test_power_one_is_alibi():
    slopes = np.array([0.5, 0.03, 1.7], np.float32)
    q, k = row(9, 70, 1_048_576), row(0, 3, 9)
    ours = kerple_power_bias(q, k, slopes, np.ones(3, np.float32))
    np.testing.assert_array_equal(ours, alibi_bias(q, k, slopes))


def test_power_two_is_a_square_and_small_r2_of_log_is_alibi():
    r1 = np.array([0.5, 0.25], np.float32)
    q, k = row(1000), row(0, 600, 1000)
    square = kerple_power_bias(q, k, r1, np.full(2, 2.0, np.float32))
    np.testing.assert_allclose(square[0, :, 0], -r1[:, None] * [[1e6, 1.6e5, 0.0]], rtol=1e-6)
    tiny = np.float32(1e-7)
    near = kerple_log_bias(q, k, r1 / tiny, np.full(2, tiny))
    np.testing.assert_allclose(near, alibi_bias(q, k, r1), rtol=1e-4)


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_at_distance_zero(form):
    method = Kerple(form=form)
    variables = variables_of(method)

    def at_zero(variables):
        return jnp.sum(bias_of_heads(method, variables, row(7), row(7)))

    value, gradients = jax.jit(jax.value_and_grad(at_zero))(variables)
    assert value == 0.0
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_beyond_its_bounds(form):
    """Values act as the bound they passed, and gradients pull them back: none is stuck."""
    method = Kerple(form=form)
    q, k = row(30), arange(31)
    outside = {"r1": jnp.full(4, -3.0), "r2": jnp.full(4, -0.5)}
    bound = {name: jnp.full(4, 0.01) for name in outside}
    np.testing.assert_array_equal(
        block_bias(method, outside, q, k), block_bias(method, bound, q, k)
    )

    def distance_of_bias(variables):  # smallest for a penalty of 2 logits at distance 30
        return jnp.sum((bias_of_heads(method, variables, q, k)[..., 0] + 2.0) ** 2)

    slope = jax.jit(jax.grad(distance_of_bias))
    gradient = slope(outside)
    assert all((np.asarray(x) < 0).all() for x in gradient.values())
    chex.assert_trees_all_close(gradient, slope(bound), rtol=1e-6)
    if form == "power":
        steep = outside | {"r1": jnp.ones(4), "r2": jnp.full(4, 2.5)}
        np.testing.assert_array_equal(
            block_bias(method, steep, q, k),
            block_bias(method, steep | {"r2": jnp.full(4, 2.0)}, q, k),
        )


@pytest.mark.parametrize(("form", "widest"), [("log", (2, 1)), ("power", (1, 2))])
def test_kerple_starts_as_the_authors_code(form, widest):
    drawn = Kerple(form=form).init(jax.random.key(0), SHAPE._replace(num_heads=2000)).layer_params
    for name, most in zip(("r1", "r2"), widest, strict=True):
        assert drawn[name].shape == (3, 2000)
        assert 0 <= drawn[name].min() < 0.01 * most and 0.99 * most < drawn[name].max() < most
        np.testing.assert_allclose(drawn[name].mean(), most / 2, rtol=0.03)


def test_clamp_value_keeps_bounds_exactly():
    x = jnp.array([-7.3, 0.01, 0.3, 2.0, 1e9])
    np.testing.assert_array_equal(clamp_value(x, 0.01, 2.0), np.clip(x, 0.01, 2.0))
    slope = jax.grad(lambda x: jnp.sum(clamp_value(x, 0.01, 2.0) ** 2))(x)
    np.testing.assert_allclose(slope, 2 * np.clip(x, 0.01, 2.0))


# --- FIRE -----------------------------------------------------------------------------------------


def fire_at(i, j, **changes):
    variables = variables_of(METHODS["fire"]) | changes
    return np.asarray(block_bias(METHODS["fire"], variables, row(i), row(j)))[0, :, 0, 0]


def test_fire_sees_distance_only_below_the_threshold():
    """Threshold 20: the same bits for equal distances at or below it, other values beyond."""
    near = fire_at(12, 5)
    for i in (7, 15, 20):
        np.testing.assert_array_equal(fire_at(i, i - 7), near)
    assert np.abs(fire_at(21, 14) - near).max() > 1e-4
    assert np.abs(fire_at(400, 393) - near).max() > 1e-2
    longer = dict(length_factor=jnp.float32(-25.0))  # |-25 * 20| = 500
    np.testing.assert_array_equal(fire_at(400, 393, **longer), fire_at(7, 0, **longer))


def test_fire_interpolates_to_the_same_ends():
    """Beyond the threshold the first token is at share 1 and the query itself at share 0."""
    for i in (33, 4096, 1_048_576):
        np.testing.assert_allclose(fire_at(i, 0), fire_at(20, 0), atol=2e-6)
        np.testing.assert_array_equal(fire_at(i, i), fire_at(20, 20))
    share = np.asarray(fire_distance(row(1_048_576), arange(1_048_577), 0.1, 20.0))[0]
    assert (np.diff(share) <= 0).all()
    assert share[-1] == 0 and 1 - 1e-6 <= share[0] <= 1


def test_fire_ignores_the_signs_of_c_and_of_the_threshold():
    flipped = fire_at(90, 4, c=jnp.float32(-0.1), length_factor=jnp.float32(-1.0))
    np.testing.assert_array_equal(flipped, fire_at(90, 4))


def test_fire_starts_as_documented():
    drawn = FIRE(mlp_width=4000, init_c=0.25).init(jax.random.key(0), SHAPE).layer_params
    np.testing.assert_array_equal(drawn["c"], np.full(3, 0.25, np.float32))
    np.testing.assert_array_equal(drawn["length_factor"], np.ones(3, np.float32))
    bounds = {"hidden_weight": 1.0, "hidden_bias": 1.0, "out_weight": 4000**-0.5}
    for name, bound in bounds.items():
        assert 0.99 * bound < np.abs(drawn[name]).max() <= bound
        np.testing.assert_allclose(np.std(drawn[name]), bound / math.sqrt(3), rtol=0.03)
    assert drawn["out_weight"].shape == (3, 4000, 4)
    assert np.abs(drawn["out_bias"]).max() <= 4000**-0.5


# --- bad input ------------------------------------------------------------------------------------

ONE = row(1)
ERRORS = {
    "shapes": (
        lambda: block_positions(np.arange(3), ONE),
        r"q_positions \(3,\), k_positions \(1, 1\): expected \[B, T\] and \[B, S\]",
    ),
    "batches": (
        lambda: t5_bias(np.zeros((2, 1), int), np.zeros((3, 1), int), np.ones((8, 2))),
        r"q_positions \(2, 1\), k_positions \(3, 1\).*the same B or 1",
    ),
    "one bucket": (lambda: T5Bias(num_buckets=1), "num_buckets=1: .* must be 2 or more"),
    "odd buckets": (
        lambda: t5_buckets(ONE, num_buckets=7, bidirectional=True),
        "num_buckets=7: expected an even number, 4 or more",
    ),
    "two buckets both ways": (
        lambda: t5_buckets(ONE, num_buckets=2, bidirectional=True),
        "num_buckets=2: expected an even number, 4 or more",
    ),
    "max distance": (
        lambda: T5Bias(max_distance=16),
        "max_distance=16: distances below 16.*num_buckets=32; expected more than 16",
    ),
    "max distance both ways": (
        lambda: t5_buckets(ONE, max_distance=8, bidirectional=True),
        "max_distance=8: distances below 8.*more than 8",
    ),
    "init_std": (lambda: T5Bias(init_std=-0.5), "init_std=-0.5: .*finite, 0 or more"),
    "endless init_std": (lambda: T5Bias(init_std=math.inf), "init_std=inf"),
    "form": (lambda: Kerple(form="exp"), "form='exp': expected one of 'log', 'power'"),
    "width": (lambda: FIRE(mlp_width=0), "mlp_width=0: hidden units of f must be 1 or more"),
    "c": (lambda: FIRE(init_c=0.0), "init_c=0.0: it must be above 0, and finite"),
    "length": (lambda: FIRE(init_length=math.nan), "init_length=nan: .*above 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", METHODS)
def test_positions_count_tokens(name):
    method = METHODS[name]
    with pytest.raises(TypeError, match="positions have dtype float16"):
        bias_of_heads(method, variables_of(method), np.zeros((1, 2), np.float16), ONE)


# The variables at which whole distances give what halves of them give with the method's own.
HALVED = {
    "kerple-log": lambda v: v | {"r2": v["r2"] / 2},
    "kerple-power": lambda v: v | {"r1": v["r1"] * 2.0 ** -v["r2"]},
    "fire": lambda v: v | {"c": v["c"] / 2, "length_factor": v["length_factor"] * 2},
}


@pytest.mark.fast("kerple-log")
@pytest.mark.parametrize("name", HALVED)
def test_half_tokens(name):
    method, variables = METHODS[name], variables_of(METHODS[name])
    variables |= {"r1": np.float32([1.0, 0.5, 2.0, 0.3]), "r2": np.float32([0.9, 0.3, 1.9, 0.5])}
    variables = {key: value for key, value in variables.items() if key in variables_of(method)}
    whole = np.array([[0, 1, 30, 31, 100_001]])
    expected = bias_of_heads(method, HALVED[name](variables), whole, whole)
    halves = (whole / 2).astype(np.float32)
    found = bias_of_heads(method, variables, halves, halves)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    assert np.ptp(np.asarray(found)) > 0.05


def test_fractions_near_far_positions_are_exact():
    q, k = np.array([[100_000.25]], np.float32), np.array([[99_999.75, 0.5]], np.float32)
    bias = alibi_bias(q, k, np.ones(1, np.float32))
    np.testing.assert_array_equal(bias[0, 0], [[-0.5, -99_999.75]])
    np.testing.assert_array_equal(relative_distance(q, np.array([[100_000]])), [[0.25]])
    with pytest.raises(TypeError, match="float32: they count tokens"):  # a bucket has no fractions
        bias_of_heads(METHODS["t5"], variables_of(METHODS["t5"]), q, k)


@every_method
def test_a_bias_method_says_so(name):
    method = METHODS[name]
    assert (
        method.kind == "bias"
        and has_hook(method, "bias")
        and not has_hook(method, "contextual_bias")
    )
    assert method.extends.startswith("yes")
    assert hash(method) == hash(type(method)(**vars(method)))
    method.check(SHAPE)
