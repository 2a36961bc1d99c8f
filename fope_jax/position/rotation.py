"""Rotary position embedding: inverse frequencies, phases good to a million tokens, one rotation.

A float32 product ``position * inv_freq`` loses the phase long before a million tokens: at position
1,048,576 neighbouring float32 numbers are 1/8 radian apart. Here a frequency is held in turns per
token as a 32-bit fixed-point fraction; the product with an integer position wraps around exactly
as the circle does. Below position 1,024, where the plain product is off by 3e-5 radians at most, it
is used, so that we agree with other implementations and their checkpoints to the last bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fope_jax.typing import Array

_TURN = 2.0**32  # one turn in fixed point
_INVERSE_TWO_PI = 1.0 / (2.0 * np.pi)
_PLAIN_PRODUCT_BELOW = 1024  # tokens


def as_array(x: Array) -> Array:
    """``x`` as it is where it is a NumPy or JAX array, else as a NumPy array."""
    return x if isinstance(x, (np.ndarray, jax.Array)) else np.asarray(x)


def token_positions(positions: Array) -> Array:
    """Positions as int32: their last 32 bits, where a value inside ``jit`` has more.

    Differences of such positions are right all the same, as long as they fit 32 bits themselves.

    Raises:
      TypeError: they are not integers.
      ValueError: a known value does not fit 32 bits.
    """
    return jnp.asarray(_checked(positions)).astype(jnp.int32)


def position_values(positions: Array) -> Array:
    """Positions as float32, of any integer dtype and the whole of its range.

    Raises:
      TypeError, ValueError: see ``token_positions``.
    """
    return jnp.asarray(_checked(positions)).astype(jnp.float32)


def _checked(positions: Array) -> Array:
    """Positions of an integer dtype; one that is known fits 32 bits."""
    positions = as_array(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions have dtype {positions.dtype}: they count tokens, pass integers")
    wide = jnp.iinfo(positions.dtype).max >= 2**31
    if wide and positions.size and not isinstance(positions, Tracer):
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
    """Raises ValueError unless ``theta`` is above 0."""
    if not theta > 0:
        raise ValueError(f"theta={theta}: the rotary base must be above 0")


def inverse_frequencies(head_dim: int, theta: float = 10_000.0) -> np.ndarray:
    """The rotary frequencies, one a pair of dimensions.

        w_m = theta ** (-2 m / H),  m = 0 .. H/2 - 1

    Returns:
      ``[H/2]`` radians per token, falling from 1; float64 NumPy, for the accuracy of ``angles``.

    Raises:
      ValueError: ``head_dim`` is odd or not positive, or ``theta`` is not above 0.

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

    The product itself below 1,024 tokens, its remainder in about [-pi, pi) beyond. Cosine and sine
    differ from float64 by less than 1e-4 for positions to 1,048,576, under ``jit`` and on TPU as
    well. A float64 NumPy constant keeps its accuracy: close over it rather than pass it into
    ``jit``. A JAX array is exact at its float32 value, which differs from the float64 one by up to
    4e-3 radians at 131,072 tokens; it may be differentiated (``d phi / d w = position``).

    Args:
      positions: integers ``[..., T]``, in tokens; negative ones rotate backwards.
      inv_freq: ``[F]`` radians per token.

    Returns:
      ``[..., T, F]`` float32 radians.

    Raises:
      TypeError: ``positions`` are not integers.
      ValueError: ``inv_freq`` is not a vector, or a position does not fit 32 bits.

    >>> phase = angles(jnp.array([[0, 1, 1_000_000]]), inverse_frequencies(4))
    >>> phase.shape
    (1, 3, 2)
    >>> bool(abs(jnp.cos(phase[0, 2, 0]) - np.cos(1_000_000.0)) < 1e-5)
    True
    """
    positions, inv_freq = jnp.asarray(_checked(positions)), as_array(inv_freq)
    if inv_freq.ndim != 1:
        raise ValueError(f"inv_freq has shape {inv_freq.shape}: it must be a vector [F]")
    if isinstance(inv_freq, np.ndarray):
        rest, whole = np.modf(inv_freq.astype(np.float64) * _INVERSE_TWO_PI % 1.0 * _TURN)
        rows = (inv_freq.astype(np.float32), whole.astype(np.uint32), rest.astype(np.float32))
        return _phase(positions, *rows)
    return _traced_angles(positions, inv_freq.astype(jnp.float32))


def _phase(positions: Array, inv_freq: Array, whole: Array, rest: Array) -> Array:
    """Radians of ``positions * inv_freq``; ``whole + rest [F]`` is one step in 2**-32 turns."""
    inv_freq, whole, rest = (
        jnp.reshape(jnp.asarray(row), (1,) * positions.ndim + row.shape)
        for row in (inv_freq, whole, rest)
    )
    position = positions[..., None]
    count = position.astype(jnp.float32)
    # Overflow is the wrap, so that the last 32 bits of a position are all that is needed here.
    wrapped = (position.astype(jnp.int32) * whole.astype(jnp.int32)).astype(jnp.float32)
    remainder = (wrapped + count * rest) * np.float32(2.0 * np.pi / _TURN)
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
    return _traced_angles(positions, inv_freq), tangent


def _fixed_point_turns(inv_freq: Array) -> tuple[Array, Array]:
    """``inv_freq / 2 pi`` modulo 1 in units of 2**-32: whole units, uint32, and the rest, float32.

    Factors of 12 significant bits have products that float32 holds exactly, whatever the compiler
    fuses. The sign comes last: the fraction above the turn below a small negative number would not
    be exact.
    """
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
    """``value`` as a sum of ``count`` numbers of 12 significant bits each, largest first."""
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

    Half-split pairs dimension ``m`` with ``m + H/2`` (GPT-NeoX, Llama); interleaved pairs
    ``2 m`` with ``2 m + 1`` (GPT-J, RoFormer). ``cos, sin`` may be off the unit circle, as in FoPE.

    Args:
      x: ``[B, T, N, H]``, any float dtype; computed in float32.
      cos, sin: ``[B, T, H/2]``, the same for all heads, or ``[B, T, N or 1, H/2]``.
      interleaved: which dimensions form a pair.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``x``.

    Raises:
      ValueError: the tables do not fit ``x``.

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
    x = jnp.asarray(x)
    wide, cos, sin = (jnp.asarray(array).astype(jnp.float32) for array in (x, cos, sin))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
