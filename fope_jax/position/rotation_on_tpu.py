"""The rotation of pairs of dimensions as a TPU computes it: by a product with a permutation.

A TPU holds rows of 128 numbers. A slice of half a head there is a copy in memory, padded to whole
rows, and so are the halves that are joined again: a sixth of what the paper's 1.2 B training step
moves. The product reads and writes whole heads, and its operations are under 1% of that step's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from fope_jax.typing import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def rotate_by_product(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """``rotation.rotate`` of arrays that fit, bit for bit.

        out = x cos + (x P) sin,   P[m + H/2, m] = -1,  P[m, m + H/2] = 1,  else 0

    P is exact in any dtype. Its pairs are neighbours where they are ``interleaved``.
    """
    cos, sin = (_of_both(table, interleaved) for table in (cos, sin))
    turned = _product(x, x.dtype, interleaved)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


@functools.partial(rotate_by_product.defjvp, symbolic_zeros=True)
def _rotate_by_product_jvp(
    interleaved: bool, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """As it is linear in x and in the tables; without this a gradient would be rounded twice.

    Both members of a pair have one sine, so (x sin) P = (x P) sin, and the transpose of the former
    multiplies the cotangent as it comes, in the dtype of x.
    """
    x, cos, sin = primals
    x_dot, *table_dots = tangents
    terms = []
    if not isinstance(x_dot, SymbolicZero):
        wide = x_dot.astype(jnp.float32)
        turned = _product(wide * _of_both(sin, interleaved), x.dtype, interleaved)
        terms.append((wide * _of_both(cos, interleaved) + turned).astype(x.dtype))
    if not all(isinstance(dot, SymbolicZero) for dot in table_dots):
        given = (
            jnp.zeros_like(table) if isinstance(dot, SymbolicZero) else dot
            for table, dot in zip((cos, sin), table_dots, strict=True)
        )
        terms.append(rotate_by_product(x, *given, interleaved))
    out = rotate_by_product(x, cos, sin, interleaved)
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


def _of_both(table: Array, interleaved: bool) -> Array:
    """``[.., H/2]`` to ``[.., H]``: the value of a pair at each of its members."""
    if interleaved:
        return jnp.repeat(table, 2, axis=-1)
    return jnp.concatenate([table, table], axis=-1)


def _product(x: Array, dtype: jnp.dtype, interleaved: bool) -> Array:
    """``x P`` in float32, exact where the numbers of ``x`` are those of ``dtype``."""
    size = x.shape[-1]
    pairs = np.arange(size).reshape((-1, 2) if interleaved else (2, -1))
    first, second = pairs.T if interleaved else pairs
    signs = np.zeros((size, size), np.float32)
    signs[second, first], signs[first, second] = -1, 1
    # A TPU's default is a product of bfloat16, six times as fast.
    is_bfloat16 = dtype == jnp.bfloat16
    return jnp.einsum(
        "...h,hg->...g",
        x,
        jnp.asarray(signs, x.dtype),
        precision=jax.lax.Precision.DEFAULT if is_bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


# One function each, which JAX then traces once for all calls of a shape.
BY_PRODUCT = [functools.partial(rotate_by_product, interleaved=value) for value in (False, True)]
