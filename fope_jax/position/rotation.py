"""Rotary position embedding: frequencies, phases accurate to a million tokens, rotation.

A float32 product ``position * inv_freq`` loses the phase on long sequences: at 1,048,576,
neighbouring float32 numbers are 1/8 radian apart. Here a frequency is a 32-bit fixed-point fraction
of a turn per token, so the integer product wraps around like the circle. Positions below 1,024 use
the plain product, off by at most 3e-5 radians, to match other implementations to the last bits.
A float32 position is split into whole tokens and the fraction of one, both exact.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fope_jax.position.checks import check_above_zero
from fope_jax.position.rotation_on_tpu import BY_PRODUCT
from fope_jax.typing import Array

_TURN = 2.0**32  # one turn in fixed point
_INVERSE_TWO_PI = 1.0 / (2.0 * np.pi)
_PLAIN_PRODUCT_BELOW = 1024  # tokens
_FRACTIONS_BELOW = 2**24  # tokens; larger float32 numbers are whole


def as_array(x: Array) -> Array:
    """NumPy and JAX arrays unchanged, anything else as a NumPy array."""
    return x if isinstance(x, (np.ndarray, jax.Array)) else np.asarray(x)


def token_positions(positions: Array) -> Array:
    """Positions as int32; wider traced values keep their last 32 bits.

    Differences that fit 32 bits are still exact. Raises as ``whole_positions``.
    """
    return whole_positions(positions).astype(jnp.int32)


def whole_positions(positions: Array) -> Array:
    """Positions in an integer dtype that holds them and int32's lengths; none is cut.

    Raises TypeError unless positions are integers, ValueError if a known value does not fit 32
    bits.
    """
    if not jnp.issubdtype(as_array(positions).dtype, jnp.integer):
        raise TypeError(
            f"positions have dtype {as_array(positions).dtype}: they count tokens, pass integers"
        )
    positions = jnp.asarray(_checked(positions))
    return positions if jnp.iinfo(positions.dtype).bits >= 32 else positions.astype(jnp.int32)


def real_positions(positions: Array) -> Array:
    """Positions as int32, or as float32 if they are, for fractions of a token.

    Float32 positions are exact multiples of their fraction, and so are their differences, as long
    as they stay below 16,777,216 times it. Raises TypeError for another dtype, ValueError for a
    known value of an integer that does not fit 32 bits or of a float32 beyond 16,777,216.
    """
    positions = _checked(positions)
    is_whole = jnp.issubdtype(positions.dtype, jnp.integer)
    return jnp.asarray(positions).astype(jnp.int32 if is_whole else jnp.float32)


def position_values(positions: Array) -> Array:
    """Positions as float32, whole range of any integer dtype; raises as ``real_positions``."""
    return jnp.asarray(_checked(positions)).astype(jnp.float32)


def _checked(positions: Array) -> Array:
    """Checks the dtype and, outside ``jit``, that values fit it."""
    positions = as_array(positions)
    is_known = positions.size and not isinstance(positions, Tracer)
    if positions.dtype == jnp.float32:
        if is_known and not (farthest := np.abs(np.asarray(positions)).max()) <= _FRACTIONS_BELOW:
            raise ValueError(
                f"position {farthest:.0f} in float32 has no fraction: pass integers, or stay "
                f"below {_FRACTIONS_BELOW}"
            )
        return positions
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            f"positions have dtype {positions.dtype}: they count tokens, pass integers (or float32 "
            "for fractions of a token)"
        )
    if is_known and jnp.iinfo(positions.dtype).max >= 2**31:
        known = np.asarray(positions)
        farthest = max(int(known.max()), -int(known.min()))
        if farthest >= 2**31:
            raise ValueError(f"position {farthest} does not fit 32 bits")
        return known.astype(np.int32)
    return positions


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless ``head_dim`` is a positive even number of dimensions."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim}: dimensions rotate in pairs, it must be even and above 0"
        )


def check_theta(theta: float) -> None:
    """Raises ValueError unless ``theta`` is finite and above 0."""
    check_above_zero("theta", theta, "the rotary base")


def inverse_frequencies(head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """The rotary frequencies, one per pair of dimensions.

        w_m = theta ** (-2 m / H),  m = 0 .. H/2 - 1

    Returns ``[H/2]`` radians per token, falling from 1, in float64 NumPy for ``angles``. Raises
    ValueError unless ``head_dim`` is even and positive and ``theta`` finite and above 0.

    >>> inverse_frequencies(8, theta=10_000.0).round(6).tolist()
    [1.0, 0.1, 0.01, 0.001]

    Reference: Su et al. 2021, "RoFormer", Eq. 15.
    """
    check_head_dim(head_dim)
    check_theta(theta)
    return float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def angles(positions: Array, inv_freq: Array) -> Array:
    """The phase of every frequency at every position, modulo one turn.

        phi[..., f] = positions[...] * inv_freq[f]  (mod 2 pi)

    Takes positions ``[..., T]``, tokens, negative ones for backwards: integers, or float32 with
    fractions of a token. ``inv_freq [F]`` is in radians per token. Returns ``[..., T, F]`` float32
    radians. Raises TypeError for another dtype of ``positions``, ValueError if ``inv_freq`` is not
    a vector or a position does not fit 32 bits, or 24 in float32.

    Below 1,024 tokens the result is the product itself, beyond it the remainder in about [-pi, pi).
    Cosine and sine are within 1e-4 of float64 up to position 1,048,576, also under ``jit`` and on
    TPU. Close over a float64 NumPy ``inv_freq``: passed into ``jit`` it becomes float32, up to 4e-3
    radians off at 131,072 tokens. A JAX array may be differentiated (``d phi / d w = position``).

    >>> phase = angles(jnp.array([[0, 1, 1_000_000]]), inverse_frequencies(4))
    >>> phase.shape
    (1, 3, 2)
    >>> bool(abs(jnp.cos(phase[0, 2, 0]) - np.cos(1_000_000.0)) < 1e-5)
    True
    >>> angles(np.array([[2.5]], np.float32), np.array([0.5])).tolist()
    [[[1.25]]]
    """
    positions, inv_freq = jnp.asarray(_checked(positions)), as_array(inv_freq)
    if inv_freq.ndim != 1:
        raise ValueError(f"inv_freq has shape {inv_freq.shape}: it must be a vector [F]")
    if isinstance(inv_freq, np.ndarray):
        rest, whole = np.modf(inv_freq.astype(np.float64) * _INVERSE_TWO_PI % 1.0 * _TURN)
        rows = (inv_freq.astype(np.float32), whole.astype(np.uint32), rest.astype(np.float32))
        return _phase(positions, *rows)
    return _traced_angles(positions, inv_freq.astype(jnp.float32))


def phase_of_one(positions: Array, frequency: float) -> Array:
    """``angles`` for one frequency, radians per token, elementwise: also inside a TPU kernel.

    >>> bool(abs(jnp.cos(phase_of_one(jnp.int32(1_000_000), 0.5)) - np.cos(500_000.0)) < 1e-5)
    True
    """
    rest, whole = np.modf(frequency * _INVERSE_TWO_PI % 1.0 * _TURN)
    return _elementwise_phase(
        positions, np.float32(frequency), np.uint32(whole).view(np.int32), np.float32(rest)
    )


def _phase(positions: Array, inv_freq: Array, whole: Array, rest: Array) -> Array:
    """Radians of ``positions * inv_freq``; ``whole + rest [F]`` is inv_freq in 2**-32 turns."""
    inv_freq, whole, rest = (
        jnp.reshape(jnp.asarray(row), (1,) * positions.ndim + row.shape)
        for row in (inv_freq, whole, rest)
    )
    return _elementwise_phase(positions[..., None], inv_freq, whole.astype(jnp.int32), rest)


def _elementwise_phase(position: Array, inv_freq: Array, whole: Array, rest: Array) -> Array:
    count = tokens = position.astype(jnp.float32)
    if position.dtype == jnp.float32:
        position = tokens = jnp.floor(position)
    # int32 overflow is the reduction modulo one turn: the last 32 bits of a position are enough.
    wrapped = (position.astype(jnp.int32) * whole).astype(jnp.float32)
    remainder = (wrapped + tokens * rest) * np.float32(2.0 * np.pi / _TURN)
    if tokens is not count:
        remainder = remainder + (count - tokens) * inv_freq
    short = jnp.abs(count) < _PLAIN_PRODUCT_BELOW
    return jnp.where(short, count * inv_freq, remainder)


@jax.custom_jvp
def _traced_angles(positions: Array, inv_freq: Array) -> Array:
    return _phase(positions, inv_freq, *_fixed_point_turns(inv_freq))


@_traced_angles.defjvp
def _traced_angles_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    positions, inv_freq = primals
    slope = positions[..., None].astype(jnp.float32)
    tangent = slope * jnp.reshape(tangents[1], (1,) * positions.ndim + inv_freq.shape)
    if positions.dtype == jnp.float32:
        rates = jnp.reshape(inv_freq, (1,) * positions.ndim + inv_freq.shape)
        tangent = tangent + tangents[0][..., None] * rates
    return _traced_angles(positions, inv_freq), tangent


def _fixed_point_turns(inv_freq: Array) -> tuple[Array, Array]:
    # 12-bit factors: float32 holds their products exactly, whatever the compiler fuses. The sign
    # comes last: the fraction of a small negative number, just under 1, would not be exact.
    size = jnp.abs(inv_freq)
    head = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(size, jnp.uint32) & np.uint32(0xFFFFF000), jnp.float32
    )
    whole = jnp.zeros(inv_freq.shape, jnp.uint32)
    rest = jnp.zeros(inv_freq.shape, jnp.float32)
    for factor in (head, size - head):
        for constant in _twelve_bit_terms(_INVERSE_TWO_PI, count=4):
            turns = factor * constant
            units = (turns - jnp.floor(turns)) * np.float32(_TURN)
            whole = whole + jnp.floor(units).astype(jnp.uint32)
            rest = rest + (units - jnp.floor(units))
    backwards = inv_freq < 0
    return jnp.where(backwards, -whole, whole), jnp.where(backwards, -rest, rest)


def _twelve_bit_terms(value: float, count: int) -> list[np.float32]:
    """``value`` as a sum of ``count`` numbers of 12 significant bits, largest first."""
    terms = []
    for _ in range(count):
        mantissa, exponent = np.frexp(value)
        term = np.ldexp(np.floor(np.ldexp(mantissa, 12)), int(exponent) - 12)
        terms.append(np.float32(term))
        value -= term
    return terms


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Turns each pair of dimensions of ``x`` by its angle.

        (a, b) -> (a cos - b sin, b cos + a sin)

    Half-split pairs ``m`` with ``m + H/2`` (GPT-NeoX, Llama), interleaved pairs ``2 m`` with
    ``2 m + 1`` (GPT-J, RoFormer). ``cos, sin`` may be off the unit circle, as in FoPE.

    Args:
      x: ``[B, T, N, H]``, any float dtype, which is kept; computed in float32. Integers raise
        TypeError, as the result would be rounded to some.
      cos, sin: ``[B, T, H/2]`` for all heads, or ``[B, T, N or 1, H/2]``; else ValueError.
      interleaved: which dimensions form a pair.

    >>> x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    >>> phase = angles(jnp.array([[1]]), np.array([np.pi / 2, 0.1]))
    >>> (rotate(x, jnp.cos(phase), jnp.sin(phase)).round(6) + 0.0).tolist()[0][0][0]
    [0.0, 0.0, 1.0, 0.0]

    Reference: Su et al. 2021, "RoFormer", Eq. 34.
    """
    given = f"cos {cos.shape} and sin {sin.shape} do not fit x {x.shape}"
    if cos.ndim == x.ndim - 1:
        cos, sin = cos[..., None, :], sin[..., None, :]
    pairs = (*x.shape[:-1], x.shape[-1] // 2)
    fits = cos.shape == sin.shape and cos.ndim == x.ndim and x.shape[-1] % 2 == 0
    if not fits or any(a not in (1, b) for a, b in zip(cos.shape, pairs, strict=True)):
        raise ValueError(f"{given}: expected [B, T, H/2] or [B, T, N, H/2] for x [B, T, N, H]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x has dtype {x.dtype}: a rotation rounded to it would be wrong; pass floats"
        )
    x, cos, sin = jnp.asarray(x), *(jnp.asarray(a).astype(jnp.float32) for a in (cos, sin))
    by_halves, by_product = _BY_HALVES[interleaved], BY_PRODUCT[interleaved]
    return jax.lax.platform_dependent(x, cos, sin, tpu=by_product, default=by_halves)


def _rotate_by_halves(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# One function each, which JAX then traces once for all calls of a shape.
_BY_HALVES = [functools.partial(_rotate_by_halves, interleaved=value) for value in (False, True)]
