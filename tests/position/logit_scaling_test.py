"""Logits under ``LogitScaling`` against NumPy, for every method inside and each form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.model.attention import attend, attention_logits, layer_arguments
from fope_jax.position import (
    FIRE,
    ALiBi,
    ByLayer,
    ByShare,
    CoPE,
    FoPE,
    Kerple,
    LogitScaling,
    LongRoPE,
    ModelShape,
    NoPE,
    PositionEmbedding,
    PositionInterpolation,
    RoPE,
    T5Bias,
    XPos,
    YaRN,
    llama4_scale,
    log_n_scale,
)
from fope_jax.position.base import bias_of_heads, has_hook

SHAPE = ModelShape(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
LENGTH, TRAINED = 23, 6
INNER = {
    "nope": NoPE(),
    "rope": RoPE(theta=100.0),
    "xpos": XPos(theta=100.0),
    "fope": FoPE(32, theta=100.0),
    "fope-query": FoPE(32, theta=100.0, heads="query"),
    "alibi": ALiBi(),
    "t5": T5Bias(init_std=1.0),
    "kerple-log": Kerple(),
    "kerple-power": Kerple(form="power"),
    "fire": FIRE(init_length=8.0),
    "cope": CoPE(max_position=5, init_std=0.7),
    "cope-heads": CoPE(max_position=9, init_std=0.7, share_heads=False),
    "by-layer": ByLayer((RoPE(), CoPE(max_position=5, init_std=0.7))),
    "by-share": ByShare((RoPE(), NoPE()), (0.5, 0.5)),
}
FORMS = {
    "log_n": {"training_length": TRAINED},
    "within": {"training_length": TRAINED, "within": True},
    "yarn": {"form": "yarn", "factor": 4.0},
}


def factors(form, positions):
    """s of each query, in float64."""
    if form == "yarn":
        return np.full(positions.shape, (0.1 * math.log(4.0) + 1) ** 2)
    s = np.log(positions + 1.0) / math.log(TRAINED)
    return s if form == "within" else np.maximum(s, 1.0)


def counted_bias(q, logits, table):
    """CoPE's bias in float64, one query after the other; -inf in ``logits`` is a closed gate."""
    bias, last = np.zeros(logits.shape), table.shape[-2] - 1
    for b, n, t in np.ndindex(logits.shape[:3]):
        rows = table if table.ndim == 2 else table[n]
        gates = 1 / (1 + np.exp(-logits[b, n, t]))
        place = np.minimum(np.cumsum(gates[::-1])[::-1], last)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, last)
        scores = rows @ q[b, t, n]
        bias[b, n, t] = scores[low] + (place - low) * (scores[high] - scores[low])
    return bias


def inputs(dtype=jnp.float32):
    random = np.random.default_rng(3)
    return (
        jnp.asarray(random.normal(size=(2, LENGTH, heads, SHAPE.head_dim)), dtype)
        for heads in (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    )


def layer_of(method):
    """The last method of a period with its variables and tables, at packed positions."""
    positions = np.concatenate([np.arange(15), np.arange(LENGTH - 15)])[None].astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 15, 1, 2)[None].astype(np.int32)
    owned = method.init(jax.random.key(1), SHAPE)
    layer = method.layers()[-1]
    variables = layer.select(owned.at_layer(0))
    tables = layer.method.tables(variables, positions, SHAPE.head_dim)
    return layer, variables, tables, positions, segments


def expected_logits(inner, form, q, k):
    """``s(i) q_i.k_j / sqrt(H) + bias[i, j]`` in float64, everything of the method but s."""
    layer, variables, tables, positions, segments = layer_of(inner)
    own = layer.method
    q, k = (np.asarray(x, np.float64) for x in own.rotate(variables, tables, q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    product = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(SHAPE.head_dim)
    earlier = positions[0][None, :] <= positions[0][:, None]
    seen = earlier & (segments[0][None, :] == segments[0][:, None])
    logits = factors(form, positions[0])[:, None] * product
    if has_hook(own, "bias"):
        logits = logits + np.asarray(
            bias_of_heads(own, variables, positions, positions), np.float64
        )
    if has_hook(own, "contextual_bias"):
        table = np.asarray(variables["position_table"], np.float64)
        logits = logits + counted_bias(q, np.where(seen, product, -np.inf), table)
    return np.where(seen, logits, -np.inf)


@pytest.mark.fast("fope-query-within", "alibi-yarn", "cope-heads-log_n")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INNER)
def test_logits(name, form):
    """Packed documents and grouped queries; all bias functions are those of the inner method."""
    method = LogitScaling(INNER[name], **FORMS[form])
    method.check(SHAPE)
    layer, variables, tables, positions, segments = layer_of(method)
    q, k, _ = inputs()
    expected = expected_logits(INNER[name], form, q, k)
    q, k = layer.method.rotate(variables, tables, q, k)
    logits = attention_logits(
        q, k, positions=positions, segments=segments, variables=variables, **layer_arguments(layer)
    )
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


def test_a_step_of_llama_4_comes_with_the_last_token_of_its_length():
    """A float32 quotient is below 1 for 41 / 41 under jit, where XLA multiplies by 1 / L."""
    positions = np.arange(3000, dtype=np.int32)
    for length in (1, 2, 7, 41, 47, 55, 61, 82, 83, 97, 100, 2**31 - 1):
        expected = 1 + 0.1 * np.log1p((positions + 1) // length)
        scale = jax.jit(functools.partial(llama4_scale, training_length=length))(positions)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
    for far in (2**31 - 1, 2**31 - 2, 2**24 * 41 + 39):
        expected = 1 + 0.1 * math.log1p((far + 1) // 41)
        assert float(llama4_scale(np.array([far]), 41)[0]) == pytest.approx(expected, rel=1e-6)
    narrow = llama4_scale(np.array([0, 99, 127], np.int8), 100)
    np.testing.assert_array_equal(narrow, llama4_scale(np.array([0, 99, 127]), 100))
    with pytest.raises(TypeError, match="float32: they count tokens"):
        llama4_scale(np.zeros(1, np.float32), 100)


def test_a_query_before_position_0_is_as_one_there():
    before = np.array([-(2**31) + 1, -9, -2, -1, 0])
    for scale in (log_n_scale, functools.partial(log_n_scale, within=True), llama4_scale):
        np.testing.assert_array_equal(scale(before, 4), np.full(5, scale(np.array([0]), 4)))


def test_attention():
    """The blockwise program calls the same functions, a few queries at a time."""
    inner = INNER["cope"]
    layer, variables, tables, positions, segments = layer_of(LogitScaling(inner, **FORMS["log_n"]))
    q, k, v = inputs()
    expected = expected_logits(inner, "log_n", q, k)
    q, k = layer.method.rotate(variables, tables, q, k)
    out = attend(
        q,
        k,
        v,
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        **layer_arguments(layer),
        bias_variables=variables,
        block=7,
    )
    weights = np.exp(expected - expected.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    wide = np.repeat(np.asarray(v), SHAPE.num_heads // v.shape[2], axis=2)
    np.testing.assert_allclose(
        out, np.einsum("bnts,bsnh->btnh", weights, wide), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_finite_with_a_contextual_bias_and_so_is_its_gradient(form):
    layer, variables, _, positions, segments = layer_of(LogitScaling(INNER["cope"], **FORMS[form]))
    segments = np.where(np.arange(LENGTH) < 3, 0, segments)

    def total(q, k, v):
        places = {"q_positions": positions, "k_positions": positions}
        places |= {"q_segments": segments, "k_segments": segments}
        functions = layer_arguments(layer)
        return jnp.sum(attend(q, k, v, **places, **functions, bias_variables=variables))

    value, gradient = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs())
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)


YARN = RoPE(scaling=(YaRN(4.0, 64),))
TEMPERATURES = {
    "yarn": YARN,
    "yarn-stated": RoPE(scaling=(YaRN(4.0, 64, attention_factor=1.1),)),
    "yarn-mscale": RoPE(scaling=(YaRN(4.0, 64, mscale=1.0, mscale_all_dim=0.5),)),
    "partial": RoPE(partial_rotary_factor=0.5, scaling=YARN.scaling),
    "longrope": RoPE(scaling=(LongRoPE((1.0,) * 4, (2.0,) * 4, 64, 4.0),)),
    "fope": FoPE(256, scaling=YARN.scaling),
    "by_layer": ByLayer((NoPE(), YARN)),
    "by_share": ByShare((NoPE(), YARN), (0.5, 0.5)),
    "by_layer-by_share": ByLayer((NoPE(), ByShare((NoPE(), YARN), (0.5, 0.5)))),
}


@pytest.mark.parametrize("form", ["log_n", "yarn"])
@pytest.mark.parametrize("name", TEMPERATURES)
def test_a_temperature_is_applied_once(name, form):
    with pytest.raises(ValueError, match=r"inner holds (YaRN|LongRoPE), whose temperature.*twice"):
        LogitScaling(TEMPERATURES[name], **FORMS[form])
    # What was trained with the model and what extends it are two things.
    LogitScaling(TEMPERATURES[name], **FORMS["within"])


@pytest.mark.parametrize(
    "inner",
    [
        RoPE(scaling=(YaRN(4.0, 64, attention_factor=1.0),)),
        RoPE(scaling=(YaRN(4.0, 64, mscale=1.0, mscale_all_dim=1.0),)),
        RoPE(scaling=(YaRN(1.0, 64),)),
        RoPE(scaling=(PositionInterpolation(4.0),)),
        RoPE(scaling=(LongRoPE((1.0,) * 4, (2.0,) * 4, 64, 4.0, attention_factor=1.0),)),
        FoPE(256, scaling=(YaRN(4.0, 64, attention_factor=1.0),)),
    ],
)
def test_a_temperature_that_is_left_out_leaves_room(inner):
    for knobs in FORMS.values():
        LogitScaling(inner, **knobs).check(SHAPE)


def test_a_factor_of_one_layer_inside_is_found():
    scaled = LogitScaling(RoPE(), training_length=8)
    with pytest.raises(ValueError, match="inner holds a LogitScaling itself: logits would be sca"):
        LogitScaling(ByLayer((scaled, NoPE())), training_length=8)


def test_a_bias_and_a_contextual_bias_in_one_method_are_refused():
    class Both(CoPE):
        def bias(self, variables, q_positions, k_positions):
            return jnp.zeros(())

    method: PositionEmbedding = LogitScaling(Both(), training_length=8)
    with pytest.raises(ValueError, match="inner=Both: it has a bias and a contextual bias"):
        method.check(SHAPE)
