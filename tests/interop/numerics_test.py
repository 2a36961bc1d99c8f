"""The drop-ins under the strict settings of tests/position/numerics_test.py."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fope_jax.interop import linen as for_linen
from fope_jax.interop import nnx as for_nnx
from fope_jax.position import ALiBi, CoPE, FoPE, Learned, LogitScaling, RoPE, Sinusoidal, XPos

LENGTH, HEADS, HEAD_DIM, WIDTH = 5, 2, 8, 16
METHODS = {
    "rope": RoPE(),
    "fope-query": FoPE(16, heads="query"),
    "xpos": XPos(),
    "alibi": ALiBi(),
    "log-n-cope": LogitScaling(CoPE(4, 0.5), training_length=3),
}
SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug NaN": lambda: jax.debug_nans(True),
}
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH))
MASK = np.tri(LENGTH, dtype=bool)[None, None]


def nnx_attention(method, dtype):
    """By the flag, by a mask at positions that are given, and one token in a key cache."""
    x, rngs = jnp.asarray(X, dtype), nnx.Rngs(0)
    inner = for_nnx.PositionAttention(
        method, num_heads=HEADS, head_dim=HEAD_DIM, decode=True, rngs=rngs
    )
    layer = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, dtype=dtype, attention_fn=inner, rngs=rngs
    )
    out = [layer(x, is_causal=True)]
    inner.set_positions(np.arange(LENGTH, dtype=np.int64)[::-1])
    out.append(layer(x, mask=jnp.asarray(MASK[..., ::-1, ::-1])))
    inner.set_positions(None)
    layer.init_cache((2, LENGTH, WIDTH), dtype=dtype)
    return [*out, layer(x[:, :1], decode=True)]


def linen_attention(method, dtype):
    x = jnp.asarray(X, dtype)
    inner = for_linen.PositionAttention(method, decode=True)
    layer = nn.MultiHeadDotProductAttention(HEADS, decode=True, dtype=dtype, attention_fn=inner)
    out, variables = layer.init_with_output(jax.random.key(0), x, mask=jnp.asarray(MASK))
    return [out, layer.apply(variables, x[:, :1], mutable=["cache"])[0]]


def others(method, dtype):
    """``Rotary`` and ``PositionEmbed`` of both libraries."""
    x = jnp.asarray(X, dtype)
    q, key = x.reshape(2, LENGTH, HEADS, HEAD_DIM), jax.random.key(0)
    rows = np.arange(2 * LENGTH, dtype=np.uint8).reshape(2, LENGTH)
    rotary = for_nnx.Rotary(method, num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0))
    linen_rotary = for_linen.Rotary(method)
    out = [rotary(q[:, :2], q, rows[:, :2], rows)]
    out.append(linen_rotary.init_with_output(key, q, q, rows)[0])
    for absolute in (Sinusoidal(), Learned(10)):
        out.append(for_nnx.PositionEmbed(absolute, d_model=WIDTH, rngs=nnx.Rngs(0))(x, rows))
        out.append(for_linen.PositionEmbed(absolute).init_with_output(key, x, rows)[0])
    return out


ROWS = {
    **{f"nnx-{name}": (nnx_attention, method) for name, method in METHODS.items()},
    **{f"linen-{name}": (linen_attention, method) for name, method in METHODS.items()},
    "rotary-and-embed": (others, FoPE(16)),
}


@pytest.mark.fast("linen-fope-query")
@pytest.mark.parametrize("name", ROWS)
def test_tracing(name):
    """Promotion of dtypes and ranks is an error here already."""
    call, method = ROWS[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        run = functools.partial(call, method, dtype)
        expected = jax.eval_shape(run)
        for setting in list(SETTINGS)[:3]:
            with SETTINGS[setting]():
                assert jax.eval_shape(run) == expected, setting


QUICK = ("linen-alibi",)


@pytest.mark.fast(*QUICK)
@pytest.mark.parametrize("name", ROWS)
def test_values(name):
    """All settings together, but for x64 and strict dtypes, which Flax's key cache cannot."""
    call, method = ROWS[name]
    for dtype, left_out in ((jnp.float32, "strict dtypes"), (jnp.bfloat16, "x64")):
        run = functools.partial(call, method, dtype)
        run = jax.jit(run) if name in QUICK else run  # the others also show NaN inside
        expected = run()
        with contextlib.ExitStack() as stack:
            for setting in SETTINGS.keys() - {left_out}:
                stack.enter_context(SETTINGS[setting]())
            found = run()
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, atol=1e-5 if dtype == jnp.float32 else 2e-2)
