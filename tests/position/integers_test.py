"""Positions of every integer dtype, to its end and beyond 32 bits: right numbers, or an error."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.position import (
    FIRE,
    ALiBi,
    DynamicNTK,
    Kerple,
    Learned,
    LogitScaling,
    LongRoPE,
    ModelShape,
    NoPE,
    RoPE,
    Sinusoidal,
    T5Bias,
    XPos,
    alibi_bias,
    angles,
    inverse_frequencies,
    log_n_scale,
)
from fope_jax.position.base import bias_of_heads, has_hook

SHAPE = ModelShape(d_model=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
METHODS = {
    "sinusoidal": Sinusoidal(),
    "learned": Learned(300),
    "rope": RoPE(),
    # The length of a row is its last position + 1, which a small dtype does not hold.
    "dynamic-ntk": RoPE(scaling=(DynamicNTK(4.0, 100),)),
    "longrope": RoPE(scaling=(LongRoPE((1.0,) * 4, (2.0,) * 4, 100, 4.0),)),
    "xpos": XPos(),
    "alibi": ALiBi(),
    "t5": T5Bias(),
    "kerple": Kerple(),
    "fire": FIRE(init_length=16.0),
    "log-n": LogitScaling(NoPE(), training_length=8),
}


@functools.cache
def drawn(method):
    owned = method.init(jax.random.key(0), SHAPE)
    return owned.at_layer(0)


def made(method, variables, positions):
    """Everything that a method makes of positions alone."""
    x = jnp.zeros((1, positions.shape[1], SHAPE.d_model))
    (layer,) = method.layers()
    own = layer.method
    out = [own.embed(variables, x, positions), own.tables(variables, positions, 8)]
    if layer.logit_scale is not None:
        out.append(layer.logit_scale(positions))
    if has_hook(own, "bias"):
        out.append(bias_of_heads(own, variables, positions, positions))
    return out


def counts_to_its_end(dtype, method, compiled):
    variables = drawn(method)
    known = np.array([[0, 1, 99, min(np.iinfo(dtype).max, 255)]], dtype)
    expected = jax.tree.leaves(made(method, variables, known.astype(np.int32)))
    with jax.enable_x64("64" in dtype):
        given = jnp.asarray(known) if compiled else known
        assert jnp.asarray(given).dtype == dtype
        run = functools.partial(made, method, variables)
        out = jax.tree.leaves((jax.jit(run) if compiled else run)(given))
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# Under x64 every operation is compiled once more.
WIDTHS = pytest.mark.parametrize("widths", ["8 16 32", pytest.param("64", marks=pytest.mark.slow)])


@pytest.mark.fast("xpos-8 16 32", "alibi-8 16 32")
@WIDTHS
@pytest.mark.parametrize("name", METHODS)
def test_every_dtype_counts_to_its_end(name, widths):
    for dtype in DTYPES:
        if dtype.lstrip("uint") in widths.split():
            counts_to_its_end(dtype, METHODS[name], compiled=False)


@pytest.mark.fast("int8-rope", "uint64-t5")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_counts_to_its_end_inside_jit(dtype, name):
    counts_to_its_end(dtype, METHODS[name], compiled=True)


FAR = {"uint32": 2**31 + 5, "int64": 2**40 + 5, "uint64": 2**63 + 5}
WIDE = pytest.mark.parametrize("dtype", FAR)


def x64(dtype):
    return jax.enable_x64(True) if "64" in dtype else contextlib.nullcontext()


@WIDE
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_known_position_beyond_32_bits_is_named(kind, dtype):
    with x64(dtype):
        far = kind(np.array([[0, FAR[dtype]]], dtype))
        near = kind(np.array([[0, 1]], dtype))
        calls = [lambda p: angles(p, inverse_frequencies(8)), lambda p: log_n_scale(p, 8)]
        calls += [lambda p: alibi_bias(p, near, np.ones(2)), lambda p: alibi_bias(near, p, [1.0])]
        calls += [lambda p, m=m: made(m, drawn(m), p) for m in METHODS.values()]
        for call in calls:
            with pytest.raises(ValueError, match=f"position {FAR[dtype]} does not fit 32 bits"):
                call(far)


@WIDE
def test_inside_jit_no_position_wraps(dtype):
    """Nothing can be raised there: angles and factors of the position, distances between such."""
    first = min(FAR[dtype], 2**40 + 5)
    known = np.array([[first, first + 3]], dtype)
    inv_freq = inverse_frequencies(8)
    with x64(dtype):
        positions = jnp.asarray(known)
        assert positions.dtype == dtype
        phase = jax.jit(lambda p: angles(p, inv_freq))(positions)
        exact = np.exp(1j * (known[..., None].astype(np.float64) * inv_freq))
        tolerance = 1e-3 if first < 2**32 else 0.2  # what float32 holds of 2**40 tokens
        np.testing.assert_allclose(
            np.exp(1j * np.asarray(phase, np.float64)), exact, atol=tolerance
        )
        scale = jax.jit(lambda p: log_n_scale(p, 8))(positions)
        np.testing.assert_allclose(scale, np.log(known + 1.0) / np.log(8), rtol=1e-5)
        bias = jax.jit(lambda p: alibi_bias(p, p, np.ones(1)))(positions)
        np.testing.assert_array_equal(bias[0, 0], [[0, -3], [-3, 0]])
        assert np.isnan(jax.jit(lambda p: XPos().tables({}, p, 8)[2])(positions)).all()
        table = {"table": jnp.zeros((300, 8), jnp.float32)}
        embed = jax.jit(lambda p: Learned(300).embed(table, jnp.zeros((1, 2, 8)), p))
        assert np.isnan(embed(positions)).all()


def test_positions_of_a_learned_table_count_tokens():
    with pytest.raises(TypeError, match="float32: they count tokens, pass integers"):
        made(Learned(300), drawn(Learned(300)), jnp.zeros((1, 2)))
