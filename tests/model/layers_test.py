import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fope_jax.model.layers import (
    linear,
    product,
    project_from_heads,
    project_to_heads,
    rms_norm,
    swiglu,
    truncated_normal,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_truncated_normal_is_cut_at_three_and_not_rescaled():
    sample = np.asarray(truncated_normal(jax.random.key(0), (300, 400), 0.02, "float32"))
    assert np.abs(sample).max() <= 0.06
    assert np.abs(sample).max() > 0.058
    # The standard normal truncated to |z| <= 3 has a standard deviation of 0.98658.
    assert sample.std() == pytest.approx(0.02 * 0.98658, rel=0.01)
    assert sample.mean() == pytest.approx(0, abs=3e-4)


def test_rms_norm_follows_its_equation():
    x, scale = normal(0, 2, 5, 16) * 3, normal(1, 16)
    x64, scale64 = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 0.1) * scale64
    np.testing.assert_allclose(rms_norm(x, scale, 0.1), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_computes_in_float32():
    # Squares of 300 overflow float16 and lose their last bits in bfloat16; 256 + 1 is 256 there.
    x = jnp.full((1, 4), 300.0, jnp.float16)
    out = rms_norm(x, jnp.array([1.0, 1.001, 2.0, -1.0]), 0.0)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out[0], [1.0, 1.001, 2.0, -1.0], atol=1e-3)


def test_linear_has_the_gradient_that_jax_derives():
    x, weight, cotangent = normal(0, 2, 7, 6), normal(1, 6, 9), normal(2, 2, 7, 9)

    def derived(x, weight):
        return jnp.einsum("btd,dm->btm", x, weight)

    out, pull = jax.vjp(linear, x, weight)
    expected_out, expected_pull = jax.vjp(derived, x, weight)
    np.testing.assert_allclose(out, expected_out, rtol=1e-6)
    for mine, theirs in zip(pull(cotangent), expected_pull(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_linear_keeps_the_gradient_of_a_float32_weight_in_float32():
    # 4,096 equal terms of 1: a bfloat16 sum stops at 256, and 4097 would round to 4096.
    x = jnp.ones((1, 4097, 1), jnp.bfloat16)
    out, pull = jax.vjp(linear, x, jnp.ones((1, 1), jnp.float32))
    d_x, d_weight = pull(jnp.ones_like(out))
    assert (out.dtype, d_x.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert d_weight.item() == 4097


def test_a_bfloat16_product_is_summed_in_float32_and_rounded_once():
    draw = jax.random.normal(jax.random.key(3), (2, 96, 200), jnp.float32).astype(jnp.bfloat16)
    x, y = draw[0], draw[1].T
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    found = jax.jit(lambda x, y: product("td,dm->tm", x, y))(x, y)
    assert found.dtype == jnp.bfloat16
    # Half a unit in the last place of 8 bits, and what sums of 200 float32 numbers may be off.
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert np.all(error <= 2.0**-8 * np.abs(exact) + 1e-4)


def test_only_a_cpu_writes_a_bfloat16_product_in_float32():
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    traced = jax.jit(lambda x, y: product("td,dm->tm", x, y)).trace(x, x)
    results = {
        platform: re.search(
            r"dot_general.*-> tensor<8x8x(\w+)>",
            traced.lower(lowering_platforms=(platform,)).as_text(),
        )[1]
        for platform in ("cpu", "tpu", "cuda")
    }
    assert results == {"cpu": "f32", "tpu": "bf16", "cuda": "bf16"}


def test_heads_are_slices_of_one_projection():
    x, weight = normal(0, 2, 3, 8), normal(1, 8, 4, 5)
    heads = project_to_heads(x, weight)
    for n in range(4):
        np.testing.assert_allclose(heads[:, :, n], x @ weight[:, n], rtol=1e-5, atol=1e-5)
    back = normal(2, 4, 5, 8)
    expected = sum(heads[:, :, n] @ back[n] for n in range(4))
    np.testing.assert_allclose(project_from_heads(heads, back), expected, rtol=1e-5, atol=1e-4)


def test_swiglu_follows_its_equation():
    x, gate, up, down = normal(0, 1, 3, 4), normal(1, 4, 6), normal(2, 4, 6), normal(3, 6, 4)
    x64, gate64, up64, down64 = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    g = x64 @ gate64
    expected = (g / (1 + np.exp(-g)) * (x64 @ up64)) @ down64
    np.testing.assert_allclose(swiglu(x, gate, up, down), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1000, 300), (7, 5, 3)])
def test_a_draw_in_a_lower_precision_is_that_of_float32_rounded(shape):
    wide = truncated_normal(jax.random.key(1), shape, 0.02, "float32")
    low = truncated_normal(jax.random.key(1), shape, 0.02, "bfloat16")
    assert (wide.dtype, low.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))
    if wide.size > 1000:  # beyond 2.4 sigma: 2 (Phi(3) - Phi(2.4)) / (2 Phi(3) - 1)
        share = (np.abs(np.asarray(low, np.float32)) > 0.048).mean()
        assert share == pytest.approx(0.01374, abs=1e-3)
        assert len(np.unique(np.asarray(low, np.float32))) > 1000
