"""The two programs of a rotation: by slices of half a head, and by a product on TPUs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fope_jax.position.rotation import _rotate_by_halves, rotate
from fope_jax.position.rotation_on_tpu import rotate_by_product

BY = {"halves": _rotate_by_halves, "product": rotate_by_product}


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_both_programs_give_the_same_bits_and_the_same_gradients(draw, dtype, interleaved):
    x, back = (draw(2, 9, 3, 12, dtype=dtype) for _ in "ab")
    cos, sin = (draw(2, 9, 3, 6) for _ in "ab")

    def with_gradients(program):
        out, pullback = jax.vjp(lambda *args: program(*args, interleaved), x, cos, sin)
        return out, *pullback(back)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out, x_bar, *table_bars = with_gradients(rotate_by_product)
    expected, expected_x_bar, *expected_table_bars = with_gradients(_rotate_by_halves)
    chex.assert_trees_all_equal((out, x_bar), (expected, expected_x_bar))
    chex.assert_trees_all_close(table_bars, expected_table_bars, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("program", BY.values(), ids=BY)
def test_derivatives_forwards_and_of_second_order(draw, program):
    """Tables are shared by heads and rows, and one of them alone may be differentiated."""
    x, cos, sin = draw(2, 5, 3, 8), draw(1, 5, 1, 4), draw(1, 5, 1, 4)
    for size in (1, 2, 3):
        given, rest = (x, cos, sin)[:size], (x, cos, sin)[size:]
        with_rest = functools.partial(lambda rest, *args: program(*args, *rest, False), rest)
        check_grads(with_rest, given, order=2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_tpu_multiplies_where_others_slice(draw, interleaved):
    x, table = draw(2, 9, 3, 12, dtype=jnp.bfloat16), draw(2, 9, 6)
    program = functools.partial(rotate, interleaved=interleaved)
    traced = jax.jit(program).trace(x, table, table)
    for platform, multiplies in (("tpu", True), ("cpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in text, "stablehlo.slice" in text) == (multiplies, not multiplies)


@pytest.mark.parametrize("x", [jnp.ones((1, 2, 1, 4), jnp.int32), np.ones((1, 2, 1, 4), bool)])
def test_integers_are_not_rotated(x):
    """They keep their dtype, so that each cosine would be cut to a whole number."""
    table = jnp.full((1, 2, 2), 0.5)
    with pytest.raises(TypeError, match=f"x has dtype {x.dtype}: .*pass floats"):
        rotate(x, table, table)
