"""Fourier series of the position: coefficients, and the tables for ``rotate``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.checks import check_choice, check_spread
from fope_jax.position.rotation import angles, as_array, check_head_dim
from fope_jax.typing import Array

SIGMA_CONVENTIONS = ("xavier", "normal")


def coefficient_std(
    sigma: float,
    num_heads: int | None,
    num_frequencies: int,
    num_outputs: int,
    convention: str = "xavier",
) -> float:
    """The standard deviation of the coefficients' noise.

        "xavier":  sigma * sqrt(2 / (D d + N d))   one matrix per head, [N, D, d]
                   sigma * sqrt(2 / (D + d))       one matrix for all heads, [D, d]
        "normal":  sigma

    The paper draws from N(0, sigma). Its code passes sigma as the gain of a Xavier initialiser,
    which reads ``[N, D, d]`` as a convolution kernel with fans ``D d`` and ``N d``. Raises
    ValueError if ``sigma`` is negative or not finite, or the convention unknown.

    >>> round(coefficient_std(0.3, 8, 16, 16), 5)
    0.02165

    Reference: Hua et al. 2025 (FoPE), Section 4.2 and the released code.
    """
    check_spread("sigma", sigma)
    if convention == "normal":
        return sigma
    check_choice("convention", convention, SIGMA_CONVENTIONS)
    if num_heads is None:
        return sigma * math.sqrt(2.0 / (num_frequencies + num_outputs))
    return sigma * math.sqrt(2.0 / (num_frequencies * num_outputs + num_heads * num_outputs))


def step_identity(num_frequencies: int, num_outputs: int) -> np.ndarray:
    """The dominant terms of the released code: column j has its 1 at row ``j * ceil(D / d)``.

    If d does not divide D, the last columns can stay zero, so those outputs are noise only (7 of 16
    in the paper's 60M model at length 1024).

    >>> step_identity(5, 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    step = math.ceil(num_frequencies / num_outputs)
    rows = np.arange(num_frequencies)[:, None]
    return (rows == step * np.arange(num_outputs)).astype(np.float32)


def own_identity(basis: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Each output's dominant term at the basis frequency nearest to its target.

    ``basis [D]`` and ``targets [d]`` are radians per token; returns ``[D, d]`` float32.

    >>> own_identity(np.array([1.0, 0.5, 0.1]), np.array([1.0, 0.1])).tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    nearest = np.abs(basis[:, None] - targets[None, :]).argmin(axis=0)
    return (np.arange(len(basis))[:, None] == nearest).astype(np.float32)


def fourier_coefficients(
    key: Array,
    num_heads: int | None,
    num_frequencies: int,
    num_outputs: int,
    sigma: float,
    *,
    convention: str = "xavier",
    separate_sine: bool = True,
    identity: Array | None = None,
) -> tuple[Array, Array]:
    """Draws the mixing coefficients: an identity (the dominant terms) plus noise.

        a[n, w, m] = identity[w, m] + N(0, std)

    Args:
      key: a JAX random key.
      num_heads: N matrices, or None for one ``[D, d]`` shared by all heads.
      num_frequencies, num_outputs: D mixed frequencies, d pairs of dimensions.
      sigma, convention: see ``coefficient_std``.
      separate_sine: draw the sine's coefficients separately; else they equal the cosine's.
      identity: ``[D, d]``; None takes ``step_identity(D, d)``.

    Returns ``cos_coef, sin_coef``, each ``[N, D, d]`` or ``[D, d]`` float32. Raises ValueError if a
    count is not positive, ``sigma`` is negative or ``identity`` has another shape.

    >>> cos_coef, sin_coef = fourier_coefficients(jax.random.key(0), 2, 5, 3, sigma=0.0)
    >>> cos_coef.shape, bool((cos_coef == step_identity(5, 3)).all())
    ((2, 5, 3), True)

    Reference: Hua et al. 2025 (FoPE), Eq. 12 and Section 4.2.
    """
    counts = {"num_heads": num_heads, "num_frequencies": num_frequencies}
    for name, count in (counts | {"num_outputs": num_outputs}).items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: at least one is needed")
    std = coefficient_std(sigma, num_heads, num_frequencies, num_outputs, convention)
    matrix = (num_frequencies, num_outputs)
    dominant = as_array(step_identity(*matrix) if identity is None else identity)
    if dominant.shape != matrix:
        raise ValueError(f"identity has shape {dominant.shape}: expected [D, d] = {matrix}")
    shape = matrix if num_heads is None else (num_heads, *matrix)
    dominant = jnp.broadcast_to(jnp.asarray(dominant, jnp.float32), shape)

    def draw(key: Array) -> Array:
        # A flat draw gives the same bits and compiles several times faster than three axes.
        noise = jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)
        return dominant + np.float32(std) * noise

    cos_key, sin_key = jax.random.split(key)
    cos_coef = draw(cos_key)
    return cos_coef, draw(sin_key) if separate_sine else cos_coef


def normalise_columns(coef: Array) -> Array:
    """Divides each output's coefficients by their sum, so the cosine is 1 at position 0.

    >>> normalise_columns(jnp.array([[1.0, 3.0], [1.0, 1.0]])).tolist()
    [[0.5, 0.75], [0.5, 0.25]]

    Reference: the pseudo-code of Hua et al. 2025 (FoPE); off by default in their released code.
    """
    return coef / coef.sum(axis=-2, keepdims=True)


def mix_tables(
    cos_basis: Array,
    sin_basis: Array,
    cos_coef: Array,
    sin_coef: Array,
    *,
    head_dim: int,
    zero_sine: float = 1.0,
) -> tuple[Array, Array]:
    """Mixes tables of single frequencies into Fourier series, one per dimension pair.

        cos[b, t, n, m] = sum_w cos_coef[n, w, m] cos_basis[b, t, w]       m < d
        sin[b, t, n, m] = sum_w sin_coef[n, w, m] sin_basis[b, t, w]       m < d
        cos, sin        = 1, zero_sine                                     d <= m < H/2

    The bases are ``[B, T, D]``, the coefficients ``[N, D, d]`` or, shared by all heads, ``[D, d]``.
    Returns ``cos, sin [B, T, N, H/2]`` float32, N = 1 if heads share; raises ValueError if shapes
    do not fit.
    """
    check_head_dim(head_dim)
    cos_coef, sin_coef = as_array(cos_coef), as_array(sin_coef)
    outputs = head_dim // 2
    if cos_coef.shape != sin_coef.shape or cos_coef.ndim not in (2, 3):
        raise ValueError(
            f"cos_coef {cos_coef.shape} and sin_coef {sin_coef.shape}: expected both [N, D, d] "
            "or both [D, d]"
        )
    if cos_coef.shape[-2] != cos_basis.shape[-1]:
        raise ValueError(
            f"cos_coef mixes D={cos_coef.shape[-2]} frequencies: {cos_basis.shape[-1]} are given"
        )
    if cos_coef.shape[-1] > outputs:
        raise ValueError(
            f"cos_coef produces d={cos_coef.shape[-1]} pairs: head_dim={head_dim} holds {outputs}"
        )

    def mix(basis: Array, coef: Array, rest: float) -> Array:
        basis, coef = jnp.asarray(basis, jnp.float32), jnp.asarray(coef, jnp.float32)
        coef = coef[None] if coef.ndim == 2 else coef
        # HIGHEST: TPU's default bfloat16 product would blur the phases.
        mixed = jnp.einsum("...tf,nfo->...tno", basis, coef, precision=jax.lax.Precision.HIGHEST)
        unmoved = (*mixed.shape[:-1], outputs - coef.shape[-1])
        return jnp.concatenate([mixed, jnp.full(unmoved, rest, jnp.float32)], axis=-1)

    return mix(cos_basis, cos_coef, 1.0), mix(sin_basis, sin_coef, zero_sine)


def fourier_tables(
    positions: Array,
    inv_freq: Array,
    cos_coef: Array,
    sin_coef: Array,
    *,
    head_dim: int,
    zero_sine: float = 1.0,
) -> tuple[Array, Array]:
    """The tables for ``rotate``: a Fourier series of the position per dimension pair.

        cos[.., m] = sum_w cos_coef[w, m] cos(w p),   sin[.., m] = sum_w sin_coef[w, m] sin(w p)

    Takes positions ``[B, T]``, tokens (``[T]`` gives tables without the batch axis), and
    ``inv_freq [D]``, radians per token, see ``angles``; for the rest and the result see
    ``mix_tables``. zero_sine is 1 in the released code (phase 45 degrees, factor sqrt 2), 0 in
    Eq. 13 of the paper. Raises ValueError if shapes do not fit, and as ``angles``.

    >>> coef = jnp.eye(2)
    >>> cos, sin = fourier_tables(jnp.array([[0]]), np.array([1.0, 0.5]), coef, coef, head_dim=8)
    >>> cos.shape, sin[0, 0, 0].tolist()
    ((1, 1, 1, 4), [0.0, 0.0, 1.0, 1.0])

    Reference: Hua et al. 2025 (FoPE), Eq. 11-13.
    """
    phase = angles(positions, inv_freq)
    return mix_tables(
        jnp.cos(phase), jnp.sin(phase), cos_coef, sin_coef, head_dim=head_dim, zero_sine=zero_sine
    )
