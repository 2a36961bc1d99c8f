"""A rotary method on a pair of dimensions, as a sum of complex exponentials.

RoPE rotates pair m at one frequency; FoPE by a Fourier series; in XPos the amplitude grows too.
Each multiplies the pair, read as a complex number, by

    u_m(p) = sum_f c_mf exp((i w_f + g_f) p)

so attention logits are a non-uniform Fourier sum. For a query q at position p and a key k at
position r, both before the rotation and complex,

    q.k after the rotation = Re sum_f G_f exp((i w_f + g_f) p)
    G_f = sum_m q_m conj(k_m) conj(u_m(r)) c_mf

PoPE's pairs are softplus(x) and 0, turned by w p, and by delta of a key. It makes two dimensions of
one, so q and k "before the rotation" are there those of position 0, which hold delta.

With the key at position 0, RoPE's coefficients are q_m conj(k_m) and p is the distance: the paper's
h(n) = sum_m H_m exp(i w_m n). FoPE's logits depend on both positions.

Reference: Hua et al. 2025, "Fourier Position Embedding", Eq. 1-5.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy.linalg import block_diag

from fope_jax.model.transformer import Transformer
from fope_jax.position import (
    FoPE,
    FoX,
    ModelShape,
    NoPE,
    PoPE,
    PositionEmbedding,
    RoPE,
    XPos,
    floor_frequency,
    normalise_columns,
)
from fope_jax.position.base import Variables, select
from fope_jax.position.mixing import ByShare
from fope_jax.position.scaling import scaled_frequencies
from fope_jax.position.xpos import xpos_decay
from fope_jax.typing import Array


class Series(NamedTuple):
    """The factors ``u_m(p)`` of one layer, see the module.

    Attributes:
      frequencies: ``[F]`` w, radians per token; the rotation of negative ones is backward.
      growth: ``[F]`` g of q, per token; k has the negative. 0 except in XPos.
      coefficients: ``[N, P, F]`` complex, c of each query head.
      pairs: ``[P, 2]`` dimensions of each pair, real part first. A dimension without a partner is
        its own, with coefficients of 2 ** -0.5, which q.k has twice.
    """

    frequencies: np.ndarray
    growth: np.ndarray
    coefficients: np.ndarray
    pairs: np.ndarray

    @property
    def distinct_frequencies(self) -> np.ndarray:
        """Distinct nonzero |w|, sorted."""
        return np.unique(np.abs(self.frequencies[self.frequencies != 0]))

    def pair_frequencies(self, pair: int) -> np.ndarray:
        """Distinct |w| of one pair of dimensions, sorted, with 0 for a constant term."""
        used = np.any(self.coefficients[:, pair] != 0, axis=0)
        return np.unique(np.abs(self.frequencies[used]))


def rotation_factors(series: Series, positions: np.ndarray, of_keys: bool = False) -> np.ndarray:
    """``u_m(p)``, complex ``[..., N, P]``, of q or of k; ``positions [...]`` are real numbers."""
    growth = -series.growth if of_keys else series.growth
    waves = np.exp(np.multiply.outer(positions, 1j * series.frequencies + growth))
    return np.einsum("...f,npf->...np", waves, series.coefficients)


def attention_coefficients(
    series: Series, q: np.ndarray, k: np.ndarray, key_positions: np.ndarray | int = 0
) -> np.ndarray:
    """G_f, complex ``[..., N, F]``, of pairs of a query and a key.

    ``q, k [..., N, H]`` are before the rotation, key-value heads repeated; ``key_positions`` is r.
    """
    q, k = (np.asarray(x, np.float64)[..., series.pairs] @ [1, 1j] for x in (q, k))
    rotated = k * rotation_factors(series, np.asarray(key_positions), of_keys=True)
    return np.einsum("...nm,nmf->...nf", q * np.conj(rotated), series.coefficients)


def frequency_components(
    series: Series, coefficients: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """The part h_f of the logits at each frequency, ``[..., F, T]``.

        h_f(p) = Re G_f exp((i w_f + g_f) p),  and without growth h_f(p + 2 pi / w_f) = h_f(p)

    The sum over F is q.k, before it is divided by sqrt(H). ``coefficients [..., F]`` come from
    ``attention_coefficients``; ``positions [T]`` are those of the query, any real number.
    """
    waves = np.exp(np.multiply.outer(1j * series.frequencies + series.growth, positions))
    return np.real(coefficients[..., None] * waves)


# ---------------------------------------------------------------------------- methods


@functools.singledispatch
def series_of(
    method: PositionEmbedding, variables: Variables, shape: ModelShape, length: int | None = None
) -> Series | None:
    """The series of one layer's method, or None if it has no frequencies.

    Args:
      method: of one layer (``PositionEmbedding.layers``); its logit scale is not included.
      variables: of the layer and of the model, without the layer axis.
      length: tokens of the sequence, for scalings that depend on it; None is the trained length.
    """
    return None


@series_of.register
def _(method: RoPE, variables, shape, length=None) -> Series:
    dims = method.rotary_dim(shape.head_dim)
    follows = length if method.limits.follows_length else None
    scaled = scaled_frequencies(dims, method.theta, method.scaling, follows)
    inv_freq = method.frequencies(shape.head_dim) if follows is None else scaled.inv_freq
    frequencies = np.asarray(inv_freq, np.float64)
    if method.learnable:  # float32, as in the model
        ratio = np.exp(np.asarray(variables["log_ratio"], np.float32))
        frequencies = frequencies.astype(np.float32) * ratio
    pairs = _pairs(dims, method.interleaved)
    rotated = _one_frequency_a_pair(frequencies, pairs, shape, scaled.attention_factor)
    if dims == shape.head_dim:
        return rotated
    return _side_by_side([rotated, _unrotated(shape.head_dim - dims, shape)], [0, dims])


@series_of.register
def _(method: XPos, variables, shape, length=None) -> Series:
    pairs = _pairs(shape.head_dim, method.interleaved)
    series = _one_frequency_a_pair(method.frequencies(shape.head_dim), pairs, shape)
    growth = np.log(xpos_decay(shape.head_dim, method.gamma)) / method.scale_base
    return series._replace(growth=growth)


@series_of.register
def _(method: FoPE, variables, shape, length=None) -> Series:
    pairs, scaled = _pairs(shape.head_dim, False), method.pairs(shape.head_dim)
    if not method.series:
        return _one_frequency_a_pair(scaled.inv_freq, pairs, shape, scaled.attention_factor)
    mixed = np.asarray(method.frequencies(shape.head_dim), np.float64)
    mixed = np.concatenate([mixed, np.asarray(variables.get("extra_frequencies", ()), np.float64)])
    matrices = []
    for matrix in (variables["cos_coef"], variables.get("sin_coef", variables["cos_coef"])):
        matrix = normalise_columns(matrix) if method.normalise else matrix
        matrix = np.asarray(matrix, np.float64)
        matrix = matrix[None] if matrix.ndim == 2 else matrix  # one for all heads
        matrices.append(np.repeat(matrix, shape.num_heads // len(matrix), axis=0))
    cos, sin = matrices  # [N, D, d]
    # C cos(w p) + i S sin(w p) = (C + S)/2 exp(i w p) + (C - S)/2 exp(-i w p)
    moving = np.concatenate([(cos + sin) / 2, (cos - sin) / 2], axis=1).swapaxes(1, 2)
    coefficients = np.zeros((shape.num_heads, len(pairs), 2 * len(mixed) + 1), complex)
    coefficients[:, : moving.shape[1], :-1] = moving
    coefficients[:, moving.shape[1] :, -1] = 1 + 1j * method.zero_sine
    frequencies = np.concatenate([mixed, -mixed, [0.0]])
    growth = np.zeros(len(frequencies))
    return Series(frequencies, growth, scaled.attention_factor * coefficients, pairs)


@series_of.register
def _(method: PoPE, variables, shape, length=None) -> Series:
    polar = method.rotary_dim(shape.head_dim)
    rest = shape.head_dim - polar
    pairs = _pairs(2 * polar, False)
    rotated = _one_frequency_a_pair(method.frequencies(shape.head_dim), pairs, shape)
    if not rest:
        return rotated
    return _side_by_side([rotated, _unrotated(rest, shape)], [0, 2 * polar])


@series_of.register
def _(method: FoX, variables, shape, length=None) -> Series | None:
    return series_of(method.rotation, select(variables, "rotation."), shape, length)


@series_of.register
def _(method: ByShare, variables, shape, length=None) -> Series | None:
    parts, dims = [], method.dims(shape.head_dim)
    for index, (inner, size) in enumerate(zip(method.methods, dims, strict=True)):
        selected = select(variables, f"{index}.")
        part = series_of(inner, selected, shape._replace(head_dim=size), length)
        parts.append(_unrotated(size, shape) if isinstance(inner, NoPE) else part)
    if method.frequencies(shape.head_dim) is None or any(part is None for part in parts):
        return None
    widths = [part.pairs.max() + 1 for part in parts]  # a polar part is wider than its share
    return _side_by_side(parts, np.cumsum([0, *widths[:-1]]).tolist())


def _pairs(dims: int, interleaved: bool) -> np.ndarray:
    """Dimensions ``[P, 2]`` of each pair: adjacent, or half a head apart."""
    numbers = np.arange(dims)
    return numbers.reshape(-1, 2) if interleaved else numbers.reshape(2, -1).T


def _one_frequency_a_pair(
    frequencies: np.ndarray, pairs: np.ndarray, shape: ModelShape, factor: float = 1.0
) -> Series:
    coefficients = factor * np.eye(len(pairs), dtype=complex)
    coefficients = np.broadcast_to(coefficients, (shape.num_heads, *coefficients.shape))
    return Series(np.asarray(frequencies, np.float64), np.zeros(len(pairs)), coefficients, pairs)


def _unrotated(dims: int, shape: ModelShape) -> Series:
    """The series of dimensions without position, in adjacent pairs."""
    pairs = _pairs(dims - dims % 2, interleaved=True)
    coefficients = np.ones((shape.num_heads, -(-dims // 2), 1), complex)
    if dims % 2:
        pairs = np.append(pairs, [[dims - 1, dims - 1]], axis=0)
        coefficients[:, -1] = 0.5**0.5
    return Series(np.zeros(1), np.zeros(1), coefficients, pairs)


def _side_by_side(parts: list[Series], first_dims: list[int]) -> Series:
    """The series of a head whose consecutive dimensions have the series ``parts``."""
    heads = zip(*(part.coefficients for part in parts), strict=True)
    coefficients = np.array([block_diag(*blocks) for blocks in heads])
    return Series(
        np.concatenate([p.frequencies for p in parts]),
        np.concatenate([p.growth for p in parts]),
        coefficients,
        np.concatenate([p.pairs + d for p, d in zip(parts, first_dims, strict=True)]),
    )


def before_rotation(
    method: PositionEmbedding, variables: Variables, q: Array, k: Array
) -> tuple[Array, Array]:
    """q ``[B, T, N, H]`` and k as the series of a layer's method takes them.

    They are as wide as after the rotation: polar dimensions are those of position 0.
    """
    if isinstance(method, FoX):
        return before_rotation(method.rotation, select(variables, "rotation."), q, k)
    if isinstance(method, ByShare):
        edges = np.cumsum(method.dims(q.shape[-1]))[:-1]
        slices = zip(jnp.split(q, edges, axis=-1), jnp.split(k, edges, axis=-1), strict=True)
        parts = [
            before_rotation(inner, select(variables, f"{index}."), *q_and_k)
            for index, (inner, q_and_k) in enumerate(zip(method.methods, slices, strict=True))
        ]
        q, k = (jnp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        return q, k
    if not isinstance(method, PoPE):
        return q, k
    origin = jnp.zeros((1, q.shape[1]), jnp.int32)
    return method.rotate(variables, method.tables(variables, origin, q.shape[-1]), q, k)


def layer_methods(model: Transformer) -> list[tuple[PositionEmbedding, Variables]]:
    """Each layer's method and its variables, with those of the model, on the host."""
    layers = model.position.layers()
    shared = {name: np.asarray(x[...]) for name, x in model.position_model.items()}
    stacked = {name: np.asarray(x[...]) for name, x in model.position_layers.items()}
    methods = []
    for number in range(model.config.num_layers):
        layer = layers[number % len(layers)]
        variables = shared | {name: x[number // len(layers)] for name, x in stacked.items()}
        methods.append((layer.method, layer.select(variables)))
    return methods


# ---------------------------------------------------------------------------- training


class TrainedPair(NamedTuple):
    """How far a pair of dimensions rotated in training.

    Attributes:
      dims: the two dimensions.
      frequency: radians per token of its strongest term; 0 for a constant.
      period: tokens of one turn; infinite for a constant.
      turns: periods within the training length.
      undertrained: it rotates, but less than one turn.
    """

    dims: tuple[int, int]
    frequency: float
    period: float
    turns: float
    undertrained: bool


def trained_pairs(series: Series, training_length: int) -> list[TrainedPair]:
    """Every pair of dimensions, after training on ``training_length`` tokens.

        turns = L w / 2 pi,   undertrained where 0 < w < 2 pi / L

    The strongest term is that of the mean over heads.

    >>> shape = ModelShape(4, 1, 1, 1, head_dim=4)
    >>> [pair.turns for pair in trained_pairs(series_of(RoPE(), {}, shape), 100)]
    [15.915494309189533, 0.15915494309189535]

    Reference: Hua et al. 2025 (FoPE), Section 3.3: ``w_m < 2 pi / N``.
    """
    floor = floor_frequency(training_length)
    strongest = np.argmax(np.abs(series.coefficients).mean(axis=0), axis=-1)
    rows = []
    for (real, imaginary), term in zip(series.pairs.tolist(), strongest, strict=True):
        w = abs(float(series.frequencies[term]))
        period = 2 * np.pi / w if w else np.inf
        turns = training_length / period
        rows.append(TrainedPair((real, imaginary), w, period, turns, 0 < w < floor))
    return rows
