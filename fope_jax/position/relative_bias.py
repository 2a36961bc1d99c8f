"""Learned biases on attention logits that depend on distance: T5's buckets, KERPLE and FIRE.

All are functions of two blocks of positions, so attention evaluates them block by block. Keys after
the query get the value of distance 0 or of the distance's size, never NaN or infinity; the causal
mask removes them. Logits stay scaled by 1 / sqrt(H) whatever the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.position.base import ModelShape, PositionEmbedding, PositionVariables, Variables
from fope_jax.position.rotation import token_positions
from fope_jax.typing import Array

KERPLE_FORMS = ("log", "power")
KERPLE_LEAST = 1e-2  # the authors' lower bound of both parameters
KERPLE_LARGEST_POWER = 2.0  # beyond it the kernel is not conditionally positive definite
FIRE_EPSILON = 1e-6


def relative_distance(q_positions: Array, k_positions: Array) -> Array:
    """How far before the query each key stands, for one block of scores.

        distance[b, t, s] = q_positions[b, t] - k_positions[b, s]

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.

    Returns:
      ``[B, T, S]`` int32 (batch axis 1 where both positions have it), negative for keys after the
      query. Integers, so that equal distances are equal wherever they stand.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> relative_distance(np.array([[1_000_002]]), np.array([[1_000_000, 1_000_003]])).tolist()
    [[[2, -1]]]
    """
    q_positions, k_positions = token_positions(q_positions), token_positions(k_positions)
    shapes = q_positions.shape, k_positions.shape
    fits = all(len(shape) == 2 for shape in shapes)
    if not fits or len({shape[0] for shape in shapes} - {1}) > 1:
        raise ValueError(
            f"q_positions {shapes[0]}, k_positions {shapes[1]}: expected [B, T] and [B, S], with "
            "the same B or 1"
        )
    return q_positions[:, :, None] - k_positions[:, None, :]


def _check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    least = 4 if bidirectional else 2
    if num_buckets < least or (bidirectional and num_buckets % 2):
        even = "an even number, " if bidirectional else ""
        raise ValueError(f"num_buckets={num_buckets}: expected {even}{least} or more")
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(
            f"max_distance={max_distance}: distances below {exact} have a bucket each with "
            f"num_buckets={num_buckets}; expected more than {exact}"
        )


def _wide_bucket_edges(num_buckets: int, max_distance: int) -> np.ndarray:
    """The least distance of each bucket that holds several, ``[num_buckets - exact - 1]`` int32.

    The formula rounds to whole numbers where a logarithm is a whole number too, and libraries
    differ in its last bit. Here it is evaluated on the host in float64 and rounded to float32,
    which sends a logarithm just below a whole number to it.
    """
    exact = num_buckets // 2
    distances = np.arange(exact, max_distance + 1)
    slots = np.log(distances / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    buckets = exact + slots.astype(np.float32).astype(np.int64)
    edges = np.searchsorted(buckets, np.arange(exact + 1, num_buckets))
    return distances[edges].astype(np.int32)


def t5_buckets(
    relative_position: Array,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Array:
    """The bucket of each relative position: one a distance when near, logarithmic when far.

        bucket = d                                                                for d <  e
        bucket = min(n - 1, e + floor((n - e) log(d / e) / log(max_distance / e)))  for d >= e

    with n = ``num_buckets`` and e = n / 2. Causal: d is how far the key stands before the query,
    and all keys after it are in bucket 0. Bidirectional: n is halved, d is the size of the
    relative position, and keys after the query use the second half of the buckets.

    Args:
      relative_position: integers of any shape, tokens, position of the key minus the query's.
      num_buckets: how many buckets there are in all.
      max_distance: from this distance on, all keys share the last bucket; tokens.
      bidirectional: whether keys after the query have buckets of their own.

    Returns:
      int32 in ``[0, num_buckets)`` of the same shape, the same on every platform: inside ``jit``
      only integers are compared.

    Raises:
      TypeError: relative positions are not integers.
      ValueError: fewer than 2 buckets (4 and even where bidirectional), or ``max_distance`` within
        the distances that have a bucket each.

    >>> t5_buckets(np.array([0, -1, -15, -16, -127, -128, 5])).tolist()
    [0, 1, 15, 16, 31, 31, 0]

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", Section 2.1, and its code.
    """
    _check_buckets(num_buckets, max_distance, bidirectional)
    before = -token_positions(relative_position)
    offset = jnp.zeros_like(before)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(before < 0, np.int32(num_buckets), offset)
        before = jnp.abs(before)
    distance = jnp.maximum(before, 0)
    exact = num_buckets // 2
    edges = _wide_bucket_edges(num_buckets, max_distance).reshape((1,) * distance.ndim + (-1,))
    passed = jnp.sum(distance[..., None] >= edges, axis=-1, dtype=jnp.int32)
    return offset + jnp.minimum(distance, exact) + passed


def t5_bias(
    q_positions: Array, k_positions: Array, table: Array, *, max_distance: int = 128
) -> Array:
    """T5's causal bias for a block of attention logits.

        bias[b, n, t, s] = table[bucket(q_positions[b, t] - k_positions[b, s]), n]

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.
      table: ``[buckets, N]``, logits.
      max_distance: see ``t5_buckets``, tokens.

    Returns:
      ``[B, N, T, S]`` float32. Keys after the query get the value of distance 0: mask them.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes, or see ``t5_buckets``.

    >>> table = np.array([[0.5], [0.25], [0.125], [0.0]])
    >>> t5_bias(np.array([[9]]), np.array([[0, 7, 8, 9]]), table, max_distance=8).tolist()
    [[[[0.0, 0.125, 0.25, 0.5]]]]

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", Section 2.1.
    """
    distance = relative_distance(q_positions, k_positions)
    buckets = t5_buckets(-distance, num_buckets=table.shape[0], max_distance=max_distance)
    # Heads first: rows of scores are then written in the order in which attention reads them.
    rows = jnp.asarray(table, jnp.float32).T
    return jnp.swapaxes(jnp.take(rows, buckets, axis=1, mode="clip"), 0, 1)


@dataclass(frozen=True)
class T5Bias(PositionEmbedding):
    """A trained bias for each head and bucket of distances, the buckets wider the farther away.

        bias[n, t, s] = table[bucket(t - s), n]

    T5 itself leaves out the factor 1 / sqrt(H) on the logits and starts from smaller weights; here
    logits stay scaled. Weight decay pulls the table to 0, which is NoPE.

    Knobs:
      num_buckets: buckets of distance, half of them one token wide; T5 uses 32.
      max_distance: from this distance on all keys share the last bucket, tokens; T5 uses 128.
      share_layers: one table for all layers, as in T5. False trains one a layer.
      init_std: standard deviation of the uniform draw, logits. None is T5X's variance scaling by
        the mean of the fans, ``sqrt(2 / (num_buckets + N))``; the port of Hugging Face draws with
        ``1 / sqrt(D)``.

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer", Section 2.1; initial values as in T5X.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; beyond max_distance one bucket"

    num_buckets: int = 32
    max_distance: int = 128
    share_layers: bool = True
    init_std: float | None = None

    def __post_init__(self) -> None:
        _check_buckets(self.num_buckets, self.max_distance, bidirectional=False)
        if self.init_std is not None and not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std={self.init_std}: a standard deviation is finite, 0 or more")

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        size = (self.num_buckets, shape.num_heads)
        std = math.sqrt(2 / sum(size)) if self.init_std is None else self.init_std

        def draw(key: Array) -> Array:
            return jax.random.uniform(key, size, jnp.float32, -1.0, 1.0) * np.float32(
                math.sqrt(3) * std
            )

        return _by_layer(draw, key, shape, "bias_table", self.share_layers)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        table = variables["bias_table"]
        return t5_bias(q_positions, k_positions, table, max_distance=self.max_distance)


def clamp_value(x: Array, least: float, most: float = math.inf) -> Array:
    """``x`` within bounds, with the gradient of ``x`` itself.

    A parameter that an optimizer has moved out of bounds has an effect as if it stood on the bound,
    and still feels which way it should move; the gradient of a plain clamp is 0 there for good.

    >>> clamp_value(jnp.array([-1.0, 0.5, 3.0]), 0.0, 2.0).tolist()
    [0.0, 0.5, 2.0]
    >>> jax.grad(lambda x: 7.0 * clamp_value(x, 0.0))(-1.0).item()
    7.0
    """
    bounded = jnp.clip(x, least, most)
    return jax.lax.stop_gradient(bounded) + (x - jax.lax.stop_gradient(x))


def _by_head(parameter: Array) -> Array:
    return jnp.asarray(parameter, jnp.float32).reshape(1, -1, 1, 1)


def kerple_log_bias(q_positions: Array, k_positions: Array, r1: Array, r2: Array) -> Array:
    """A penalty that grows with the logarithm of distance.

        bias[b, n, t, s] = -r1[n] * log(1 + r2[n] * |q_positions[b, t] - k_positions[b, s]|)

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.
      r1: ``[N]`` above 0, logits.
      r2: ``[N]`` above 0, per token.

    Returns:
      ``[B, N, T, S]`` float32.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> r1 = np.full(1, 1 / np.log(2))
    >>> kerple_log_bias(np.array([[3]]), np.array([[3, 2, 0]]), r1, np.ones(1)).tolist()
    [[[[-0.0, -1.0, -2.0]]]]

    Reference: Chi et al. 2022, "KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation", Section 4, the logarithmic variant.
    """
    distance = jnp.abs(relative_distance(q_positions, k_positions))[:, None].astype(jnp.float32)
    return -_by_head(r1) * jnp.log1p(_by_head(r2) * distance)


def kerple_power_bias(q_positions: Array, k_positions: Array, r1: Array, r2: Array) -> Array:
    """A penalty that grows with a power of distance; with exponent 1 it is ALiBi's.

        bias[b, n, t, s] = -r1[n] * |q_positions[b, t] - k_positions[b, s]| ** r2[n]

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.
      r1: ``[N]`` above 0, logits.
      r2: ``[N]`` above 0, at most 2.

    Returns:
      ``[B, N, T, S]`` float32.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> half = np.full(1, 0.5)
    >>> kerple_power_bias(np.array([[9]]), np.array([[9, 5, 0]]), np.ones(1), half).tolist()
    [[[[-0.0, -2.0, -3.0]]]]

    Reference: Chi et al. 2022, "KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation", Section 4, the power variant.
    """
    distance = jnp.abs(relative_distance(q_positions, k_positions))[:, None].astype(jnp.float32)
    # The gradient of a power has a logarithm of the distance, at distance 0 infinite times 0.
    powers = jnp.power(jnp.maximum(distance, 1.0), _by_head(r2))
    return -_by_head(r1) * jnp.where(distance > 0, powers, 0.0)


@dataclass(frozen=True)
class Kerple(PositionEmbedding):
    """A penalty on distance that each head of each layer learns the shape of.

        log:    bias[n, t, s] = -r1[n] * log(1 + r2[n] * |t - s|)
        power:  bias[n, t, s] = -r1[n] * |t - s| ** r2[n]

    Both parameters act as if they were 0.01 where they are less, the exponent as 2 where it is
    more, as in the authors' code. That code moves the stored values onto the bound as well; here
    the optimizer alone moves them, and the gradient passes the bound, so that none is stuck beyond
    it. Weight decay pulls both towards 0, that is towards the bound: a nearly flat bias.

    Knobs:
      form: ``log`` or ``power``. The paper finds that ``log`` extends better.

    Reference: Chi et al. 2022, "KERPLE: Kernelized Relative Positional Embedding for Length
    Extrapolation", Section 4; initial values and bounds as in the authors' code: uniform, ``log``
    r1 in [0, 2) and r2 in [0, 1), ``power`` r1 in [0, 1) and r2 in [0, 2).
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; a learned penalty that grows with distance"

    form: str = "log"

    def __post_init__(self) -> None:
        if self.form not in KERPLE_FORMS:
            expected = ", ".join(map(repr, KERPLE_FORMS))
            raise ValueError(f"form={self.form!r}: expected one of {expected}")

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        widest = {"log": (2.0, 1.0), "power": (1.0, 2.0)}[self.form]
        size = (shape.num_layers, shape.num_heads)
        drawn = {
            name: jax.random.uniform(key, size, jnp.float32, 0.0, most)
            for name, key, most in zip(("r1", "r2"), jax.random.split(key), widest, strict=True)
        }
        return PositionVariables(layer_params=drawn)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        r1 = clamp_value(variables["r1"], KERPLE_LEAST)
        if self.form == "log":
            r2 = clamp_value(variables["r2"], KERPLE_LEAST)
            return kerple_log_bias(q_positions, k_positions, r1, r2)
        r2 = clamp_value(variables["r2"], KERPLE_LEAST, KERPLE_LARGEST_POWER)
        return kerple_power_bias(q_positions, k_positions, r1, r2)


def fire_distance(q_positions: Array, k_positions: Array, c: Array, threshold: Array) -> Array:
    """Distance as a share of the query's position, both on a logarithmic scale.

        psi(|i - j|) / (psi(max(threshold, i)) + 1e-6),  psi(x) = log(|c| x + 1)

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, i, tokens since the start of the segment.
      k_positions: integers ``[B, S]`` or ``[1, S]``, j, tokens.
      c: a number, per token; its sign does not matter.
      threshold: a number, tokens; below it the share is of the threshold, so that it depends on
        distance only.

    Returns:
      ``[B, T, S]`` float32, in [0, 1] for keys up to the query.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> share = fire_distance(np.array([[31, 1023]]), np.array([[0, 31]]), 1.0, 1023.0)
    >>> np.asarray(share, np.float64).round(6).tolist()
    [[[0.5, 0.0], [1.0, 0.995565]]]

    Reference: Li et al. 2023, "Functional Interpolation for Relative Positions Improves Long
    Context Transformers", Section 3.
    """
    distance = jnp.abs(relative_distance(q_positions, k_positions)).astype(jnp.float32)
    position = token_positions(q_positions).astype(jnp.float32)
    longest = jnp.maximum(position, jnp.asarray(threshold, jnp.float32))
    rate = jnp.abs(jnp.asarray(c, jnp.float32))
    return jnp.log1p(rate * distance) / (jnp.log1p(rate * longest) + FIRE_EPSILON)[:, :, None]


def fire_bias(
    q_positions: Array,
    k_positions: Array,
    *,
    c: Array,
    threshold: Array,
    hidden_weight: Array,
    hidden_bias: Array,
    out_weight: Array,
    out_bias: Array,
) -> Array:
    """A small network's value at the share that distance has of the query's position.

        bias[n, t, s] = f_n(share[t, s]),  f(x) = relu(x w1 + b1) w2 + b2

    Args:
      q_positions: integers ``[B, T]`` or ``[1, T]``, tokens since the start of the segment.
      k_positions: integers ``[B, S]`` or ``[1, S]``, tokens.
      c: a number, see ``fire_distance``.
      threshold: a number, see ``fire_distance``.
      hidden_weight: w1, ``[width]``.
      hidden_bias: b1, ``[width]``.
      out_weight: w2, ``[width, N]``, logits.
      out_bias: b2, ``[N]``, logits. A constant of all keys, so the softmax does not see it.

    Returns:
      ``[B, N, T, S]`` float32.

    Raises:
      TypeError: positions are not integers.  ValueError: other shapes.

    >>> one = np.ones(1, np.float32)
    >>> fire_bias(
    ...     np.array([[4]]), np.array([[0, 4]]), c=1.0, threshold=2.0, hidden_weight=one,
    ...     hidden_bias=0.5 * one, out_weight=-2 * one[:, None], out_bias=one,
    ... ).round(4).tolist()
    [[[[-2.0, 0.0]]]]

    Reference: Li et al. 2023, "Functional Interpolation for Relative Positions Improves Long
    Context Transformers", Section 3 and the code in its appendix.
    """
    share = fire_distance(q_positions, k_positions, c, threshold)[..., None]
    weight, offset = (
        jnp.asarray(row, jnp.float32).reshape(1, 1, 1, -1) for row in (hidden_weight, hidden_bias)
    )
    hidden = jax.nn.relu(share * weight + offset)
    # On TPU a product of default precision would round the hidden layer to 8 bits.
    out_weight = jnp.asarray(out_weight, jnp.float32)
    out = jnp.einsum("btsw,wn->bnts", hidden, out_weight, precision="highest")
    return out + _by_head(out_bias)


@dataclass(frozen=True)
class FIRE(PositionEmbedding):
    """A learned function of distance over position, so that longer inputs stay in its domain.

        bias[n, i, j] = f_n(psi(i - j) / psi(max(L, i))),  psi(x) = log(|c| x + 1)

    f is a network of one hidden layer, c and the multiple of ``init_length`` that is the threshold
    L are learned too. Queries below L see distance only, those beyond L see its share of their
    position. Positions count from the start of the segment. Weight decay pulls f to 0, which is
    NoPE; c to 0, where psi becomes linear; and L to 0, where every query interpolates.

    Knobs:
      mlp_width: hidden width of f; the paper uses 32.
      init_c: initial c, per token; the paper's 0.1.
      init_length: initial threshold L, tokens; the paper's 512, fixed, times a learned factor that
        starts at 1.
      share_layers: one f, c and L for all layers, the paper's FIRE-S. False trains one a layer.

    Reference: Li et al. 2023, "Functional Interpolation for Relative Positions Improves Long
    Context Transformers", Section 3 and the code in its appendix; weights and biases of f start
    uniform within 1 / sqrt(inputs of the layer), that code's default.
    """

    kind: ClassVar[str] = "bias"
    extends: ClassVar[str] = "yes; distances as a share of the position"

    mlp_width: int = 32
    init_c: float = 0.1
    init_length: float = 512.0
    share_layers: bool = False

    def __post_init__(self) -> None:
        if self.mlp_width < 1:
            raise ValueError(f"mlp_width={self.mlp_width}: at least one hidden unit is needed")
        for name in ("init_c", "init_length"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: it must be finite and above 0")

    def init(self, key: Array, shape: ModelShape) -> PositionVariables:
        width = self.mlp_width

        def draw(key: Array) -> Variables:
            keys = jax.random.split(key, 4)

            def uniform(index: int, size: tuple[int, ...], inputs: int) -> Array:
                bound = 1 / math.sqrt(inputs)
                return jax.random.uniform(keys[index], size, jnp.float32, -bound, bound)

            return {
                "c": jnp.float32(self.init_c),
                "length_factor": jnp.float32(1.0),
                "hidden_weight": uniform(0, (width,), 1),
                "hidden_bias": uniform(1, (width,), 1),
                "out_weight": uniform(2, (width, shape.num_heads), width),
                "out_bias": uniform(3, (shape.num_heads,), width),
            }

        return _by_layer(draw, key, shape, None, self.share_layers)

    def bias(self, variables: Variables, q_positions: Array, k_positions: Array) -> Array:
        names = ("c", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
        threshold = jnp.abs(variables["length_factor"] * np.float32(self.init_length))
        own = {name: variables[name] for name in names}
        return fire_bias(q_positions, k_positions, threshold=threshold, **own)


def _by_layer(
    draw: Callable, key: Array, shape: ModelShape, name: str | None, share_layers: bool
) -> PositionVariables:
    """Trained parameters drawn once for the model or once a layer; ``name`` where it is one."""
    drawn = draw(key) if share_layers else jax.vmap(draw)(jax.random.split(key, shape.num_layers))
    params = drawn if name is None else {name: drawn}
    if share_layers:
        return PositionVariables(model_params=params)
    return PositionVariables(layer_params=params)
