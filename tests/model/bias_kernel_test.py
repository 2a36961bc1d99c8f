"""The kernel for TPU, its program run on CPU, against the attention that holds all scores."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.gallery.examples import examples
from fope_jax.model import bias_kernel
from fope_jax.model.attention import attend, layer_arguments
from fope_jax.model.backends import visited_blocks
from fope_jax.model.bias_kernel import pallas_attention
from fope_jax.model.masks import TokenIndex, attention_mask
from fope_jax.model.running_sums import running_sums
from fope_jax.position import NoPE
from fope_jax.position.base import ModelShape, PositionEmbedding, bias_of_heads
from fope_jax.position.logit_scaling import LogitScaling
from fope_jax.position.relative_bias import FIRE, T5Bias
from tests.model.backends_test import packed

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 24
SHAPE = ModelShape(96, 1, HEADS, KV_HEADS, HEAD_DIM)
METHODS = {
    name: method for name, method in examples(100, HEAD_DIM).items() if method.kind == "bias"
} | {"nope": examples(100, HEAD_DIM)["nope"]}


def variables_of(method: PositionEmbedding) -> dict[str, jax.Array]:
    """Of the only layer, moved so that no two heads are alike."""
    drawn = method.init(jax.random.key(0), SHAPE)
    return {name: x * np.float32(1.25) for name, x in drawn.at_layer(0).items()}


def axes_of_heads(method: PositionEmbedding, names) -> dict[str, int | None]:
    axes = {name: method.variable_axes(name) for name in names}
    return {name: own.index("heads") if "heads" in own else None for name, own in axes.items()}


def kernel(method, q, k, v, own, q_index, k_index, **others):
    index = {"q_index": q_index, "k_index": k_index}
    return pallas_attention(
        q, k, v, method=method, variables=own, interpret=True, **index, **others
    )


def reference(method, q, k, v, own, q_index, k_index, **others):
    return attend(
        q,
        k,
        v,
        q_positions=q_index.positions,
        k_positions=k_index.positions,
        q_segments=q_index.segments,
        k_segments=k_index.segments,
        backend="reference",
        bias_variables=own,
        **(layer_arguments(method.layers()[0]) | others),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(attention, method, q, k, v, own, q_index, k_index):
    direction = jax.random.normal(jax.random.key(1), q.shape)

    def loss(q, k, v, own):
        out = attention(method, q, k, v, own, q_index, k_index)
        return jnp.sum(out * direction), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, own)
    return out, gradients


def assert_same(method, arrays, q_index, k_index, idle=("out_bias",)):
    """``idle``: variables without effect, such as a constant of all keys."""
    own = variables_of(method)
    case = (method, *arrays, own, q_index, k_index)
    out, gradients = value_and_gradients(kernel, *case)
    expected, expected_gradients = value_and_gradients(reference, *case)
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for found, right in zip(gradients[:3], expected_gradients[:3], strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5)
    for name in own:
        right = np.asarray(expected_gradients[3][name])
        if name not in idle:
            assert np.abs(right).max() > 1e-3, name
        # One without effect is a sum of thousands of terms that cancel.
        largest = 5.0 if name in idle else max(1.0, float(np.abs(right).max()))
        np.testing.assert_allclose(gradients[3][name], right, atol=1e-5 * largest)


@pytest.mark.fast("fire")
@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_of_the_reference(name):
    """Several documents a row, padding, grouped heads, a head_dim of no whole lanes."""
    arrays, positions, segments = packed(2, 384, HEADS, KV_HEADS, HEAD_DIM)
    places = TokenIndex(positions, segments)
    # A narrower network of FIRE's: the kernel's program has a line for each of its numbers.
    method = FIRE(mlp_width=4) if name == "fire" else METHODS[name]
    assert_same(method, arrays, places, places)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alibi", pytest.param("fire", marks=pytest.mark.slow)])
def test_queries_of_one_device_see_the_keys_of_all(name):
    """As where devices share the tokens of a row, far from position 0, with places all rows share.

    The queries are the last of the row: ALiBi's bias is a whole number times a slope there too.
    """
    (q, k, v), _, _ = packed(2, 512, HEADS, KV_HEADS, HEAD_DIM)
    positions = (1_000_000 + np.arange(512, dtype=np.int32))[None]
    segments = np.where(np.arange(512) < 200, 1, 2).astype(np.int32)[None]
    q_index = TokenIndex(positions[:, 256:], segments[:, 256:])
    assert_same(
        METHODS[name],
        (q[:, 256:], k, v),
        q_index,
        TokenIndex(positions, segments),
        idle=("out_bias", "length_factor"),  # no position is below FIRE's threshold
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alibi", "kerple-power"])
def test_fractions_of_a_token(name):
    arrays, positions, segments = packed(2, 384, HEADS, KV_HEADS, HEAD_DIM)
    fractions = np.random.default_rng(0).integers(0, 32, np.shape(positions)) / 32
    places = TokenIndex((np.asarray(positions) + fractions).astype(np.float32), segments)
    assert_same(METHODS[name], arrays, places, places)


RANGES = {"window": {"window": 70}, "chunk": {"chunk": 96}, "both": {"window": 70, "chunk": 96}}
LAYERS = {
    "window": {"window": 70},
    "chunk": {"chunk": 96},
    "far": {"far_from": 50},
    "wide": {"width": 40},
    "sinks": {"sinks": True},
    "sums": {"sums": True},
    "window, wide, sinks": {"window": 70, "width": 40, "sinks": True},
    "all": {
        "method": "alibi",
        "window": 70,
        "chunk": 96,
        "far_from": 40,
        "width": 40,
        "sinks": True,
        "sums": True,
        "num_queries": 128,
    },
}


def layer_case(
    *,
    method="nope",
    far_from=None,
    width=HEAD_DIM,
    sinks=False,
    sums=False,
    num_queries=384,
    **limits,
):
    """The last ``num_queries`` of 384 tokens, packed; the arguments of both programs and arrays."""
    random = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape).astype(np.float32))

    versions = 1 if far_from is None else 2
    _, positions, segments = packed(2, 384, HEADS, KV_HEADS, HEAD_DIM)
    arrays = {
        "q": normal(2, num_queries, HEADS, versions * width),
        "k": normal(2, 384, KV_HEADS, versions * width),
        "v": normal(2, 384, KV_HEADS, HEAD_DIM),
        "own": variables_of(METHODS[method]),
    }
    if sinks:
        arrays["sinks"] = normal(HEADS)
    if sums:
        # Sums as after 10^5 tokens: rounded to one float32 they would be wrong by 0.004.
        decays = jnp.abs(normal(2, 384, HEADS)) * 0.05
        arrays["k_sums"] = running_sums(-decays).at[..., 0].add(-1e5)
        arrays["q_sums"] = arrays["k_sums"][:, -num_queries:]
    places = TokenIndex(positions, segments)
    queries = TokenIndex(*(x[:, -num_queries:] for x in places))
    return METHODS[method], {"far_from": far_from, **limits}, queries, places, arrays


@pytest.mark.fast("all")
@pytest.mark.parametrize("name", LAYERS)
def test_all_that_a_layer_can_have_is_as_in_the_reference(name):
    """Several documents a row, padding, grouped heads; in "all" also fewer queries than keys."""
    method, limits, queries, places, arrays = layer_case(**LAYERS[name])
    direction = jax.random.normal(jax.random.key(1), (*arrays["q"].shape[:3], HEAD_DIM))

    def both(attention):
        def loss(arrays):
            out = attention(method, q_index=queries, k_index=places, **arrays, **limits)
            return jnp.sum(out * direction), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return out, gradients

    (out, gradients), (expected, expected_gradients) = both(kernel), both(reference)
    assert jnp.abs(expected[0, -37:]).max() == 0 < jnp.abs(expected[0, :-37]).min()
    np.testing.assert_allclose(out, expected, atol=3e-6)
    assert set(gradients) == set(arrays)
    for array, right in expected_gradients.items():
        for found, of_one in zip(
            jax.tree.leaves(gradients[array]), jax.tree.leaves(right), strict=True
        ):
            largest = float(jnp.abs(of_one).max())
            # The softmax is blind to what all keys of a row share, unless a sink is among them.
            assert largest > 0.1 or (array == "q_sums" and "sinks" not in arrays), array
            np.testing.assert_allclose(found, of_one, atol=2e-5 * max(1.0, largest / 10))


@pytest.mark.fast("{'window': 1}")
@pytest.mark.parametrize("limits", [{}, *RANGES.values(), {"window": 1}, {"chunk": 128}], ids=str)
def test_the_grid_is_as_long_as_what_a_range_visits(limits):
    """In a row of one document; no block more, so a window costs its own length, not the row's."""
    places = TokenIndex(jnp.arange(1024)[None], jnp.ones((1, 1024), jnp.int32))
    settings = bias_kernel._Settings(block=128, scale=1.0, **limits)
    visible = np.zeros((8, 8), bool)
    mask = np.asarray(attention_mask(places, places, **limits))[0]
    for i, j in np.ndindex(8, 8):
        visible[i, j] = mask[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].any()
    assert visited_blocks(8, 128, **limits) == visible.sum()
    for by_query, blocks in ((True, visible), (False, visible.T)):
        first, last, steps = bias_kernel._ranges(settings, places, places, by_query=by_query)
        np.testing.assert_array_equal((last - first)[0] + 1, blocks.sum(axis=1))
        assert steps == blocks.sum(axis=1).max()


@pytest.mark.slow
def test_a_window_of_the_whole_row_is_none():
    (q, k, v), positions, segments = packed(1, 256, HEADS, KV_HEADS, HEAD_DIM)
    places, method = TokenIndex(positions, segments), METHODS["alibi"]

    @functools.partial(jax.jit, static_argnums=0)
    def attended(limits):
        return pallas_attention(
            q,
            k,
            v,
            q_index=places,
            k_index=places,
            method=method,
            variables=variables_of(method),
            interpret=True,
            **dict(limits),
        )

    np.testing.assert_array_equal(attended((("window", 256), ("chunk", 2**31 - 1))), attended(()))


@pytest.mark.slow
def test_a_query_that_sees_no_key_gives_zeros():
    (q, k, v), _, _ = packed(1, 128, HEADS, KV_HEADS, HEAD_DIM)
    here = TokenIndex(np.zeros((1, 128), np.int32), np.ones((1, 128), np.int32))
    elsewhere = TokenIndex(here.positions, here.segments + 1)
    method = METHODS["alibi"]
    own = variables_of(method)
    case = (method, q, k, v, own, here, elsewhere)
    out, gradients = value_and_gradients(kernel, *case)
    assert all(np.all(np.asarray(x) == 0) for x in (out, *jax.tree.leaves(gradients)))


def test_bfloat16_is_the_reference_in_bfloat16():
    arrays, positions, segments = packed(1, 256, HEADS, KV_HEADS, HEAD_DIM)
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in arrays)
    places, method = TokenIndex(positions, segments), METHODS["alibi"]
    out, expected = (
        jax.jit(attention, static_argnums=0)(method, *arrays, variables_of(method), places, places)
        for attention in (kernel, reference)
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02)


@pytest.mark.parametrize(("t", "s", "message"), [(100, 128, "T = 100"), (128, 200, "S = 200")])
def test_lengths_of_no_whole_lanes_are_named(t, s, message):
    q, k = jnp.ones((1, t, 2, 8)), jnp.ones((1, s, 2, 8))
    places = [TokenIndex(*[jnp.ones((1, n), jnp.int32)] * 2) for n in (t, s)]
    with pytest.raises(ValueError, match=f"{message} tokens: the kernel takes multiples of 128"):
        pallas_attention(q, k, k, q_index=places[0], k_index=places[1], method=NoPE(), variables={})


BOTH_WAYS = T5Bias(num_buckets=8, max_distance=24, init_std=1.0, bidirectional=True)


@pytest.mark.fast("ALiBi(slopes=None)", "Sandwich(width=128)")
@pytest.mark.parametrize(
    "method", [*(METHODS[name] for name in METHODS if name != "nope"), BOTH_WAYS], ids=str
)
def test_the_bias_of_one_head_is_the_bias(method):
    """At all scales of distance, before and after the query, whatever the shape of the block."""
    own = variables_of(method)
    axes = axes_of_heads(method, own)
    q_positions = np.array([[0, 1, 7, 8, 40, 130, 5_000, 1_048_576]], np.int32)
    k_positions = np.array([[0, 1, 6, 15, 16, 90, 127, 4_000, 1_048_500]], np.int32)
    expected = jax.jit(bias_of_heads, static_argnums=0)(method, own, q_positions, k_positions)[0]
    bias = jax.jit(method.bias)
    for head in range(HEADS):
        values = {}
        for variable, x in own.items():
            x = x if axes[variable] is None else jnp.take(x, head, axes[variable])
            values[variable] = tuple(x) if x.ndim else x
        found = bias(values, q_positions, k_positions.T)
        np.testing.assert_allclose(found, expected[head].T, rtol=1e-6, atol=1e-6)


def test_a_scaled_method_keeps_its_bias():
    inner = METHODS["alibi"]
    (layer,) = LogitScaling(inner, form="log_n", training_length=64).layers()
    values = {"slopes": jnp.float32(0.5)}
    assert layer.method.bias(values, jnp.array([[9]]), jnp.array([[2]])) == -3.5


@dataclass(frozen=True)
class Recency(PositionEmbedding):
    """A bias of the keys alone, the same for all heads and queries."""

    def bias(self, variables, q_positions, k_positions):
        return variables["slope"] * jnp.sin(k_positions.astype(jnp.float32))


@pytest.mark.slow
def test_a_bias_without_heads_and_queries_is_spread_over_them():
    (q, k, v), positions, segments = packed(1, 128, HEADS, KV_HEADS, HEAD_DIM)
    places = TokenIndex(positions, segments)
    case = (Recency(), q, k, v, {"slope": jnp.float32(1.5)}, places, places)
    out, gradients = value_and_gradients(kernel, *case)
    expected, expected_gradients = value_and_gradients(reference, *case)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for found, right in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)
