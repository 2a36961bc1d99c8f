"""Assertions on position embeddings and causal models, for your own functions and modules.

Each takes a function, asserts one property that a method promises, and raises AssertionError with
the largest difference and where it is. ``x`` may be an array or any pytree of arrays ``[B, T,
...]``; positions are int32 tokens ``[B, T]``. Nothing here knows of fope_jax's own classes::

    from fope_jax import testing

    def test_my_rotation():
        testing.assert_shift_invariant(lambda p: my_logits(q, k, p), positions)
        testing.assert_causal(my_model, tokens)

They are built on chex (``pip install chex``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.extras import require
from fope_jax.typing import Array

ROUNDING = 5e-5  # float32 rounding of sums over a head whose size is about 50
FAR = 1_048_576  # tokens

Tree = Any


def assert_shift_invariant(
    logits: Callable[[Array], Array], positions: Array, *, shift: int = 150, atol: float = 1e-3
) -> None:
    """Logits depend on distances only: ``logits(positions + shift) = logits(positions)``.

    >>> inv_freq = np.array([1.0, 0.1])
    >>> q, k = np.ones((2, 1, 5, 1, 4), np.float32)
    >>> def logits(positions):
    ...     phase = positions[..., None] * inv_freq
    ...     q_turned, k_turned = (rotate(x, jnp.cos(phase), jnp.sin(phase)) for x in (q, k))
    ...     return jnp.einsum("btnh,bsnh->bnts", q_turned, k_turned)
    >>> from fope_jax.position import rotate
    >>> assert_shift_invariant(logits, np.arange(5)[None])
    >>> assert_shift_invariant(lambda p: logits(p * p), np.arange(5)[None])
    Traceback (most recent call last):
      ...
    AssertionError: logits at positions + 150 differ from those at positions ...
    """
    where = f"logits at positions + {shift} differ from those at positions"
    _assert_close(logits(positions + shift), logits(positions), atol, where)


def assert_causal(function: Callable[[Tree], Array], x: Tree, *, atol: float = ROUNDING) -> None:
    """No output depends on what comes after it: ``y[:, :t]`` stays where ``x[:, t:]`` changes.

    Args:
      function: ``x`` to ``y [B, T, ...]``, the whole model or one attention.
      x: tokens or vectors. Each leaf is changed by moving its rows by one place, so its tokens must
        not all be equal.
      atol: largest difference allowed, in the units of ``y``.

    Also raises where nothing at all changes: the function does not read ``x``.
    """
    whole, length = np.asarray(function(x)), _length(x)
    moved = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=1), x)
    for t in sorted({1, length // 2, length - 1} - {0}):
        changed = jax.tree.map(
            lambda a, b, t=t: np.concatenate([a[:, :t], b[:, t:]], axis=1), x, moved
        )
        y = np.asarray(function(changed))
        where = f"outputs before token {t} depend on tokens from {t} on"
        _assert_close(y[:, :t], whole[:, :t], atol, where)
        if np.array_equal(y[:, t:], whole[:, t:]):
            raise AssertionError(f"no output depends on the tokens from {t} on: is x read at all?")


def assert_prefix_unchanged(
    function: Callable[[Tree, Array], Array],
    x: Tree,
    positions: Array,
    prefix: int,
    *,
    atol: float = ROUNDING,
    key_axis: int | None = None,
) -> None:
    """A prefix alone gives what it gives inside the whole: nothing depends on the array's length.

    Args:
      function: ``(x, positions)`` to ``y [B, T, ...]``.
      x, positions: the whole, of ``T`` tokens.
      prefix: tokens of the prefix, less than ``T``.
      atol: largest difference allowed.
      key_axis: the axis of ``y`` that counts keys, if there is one; it is cut as well.
    """
    part = jax.tree.map(lambda leaf: leaf[:, :prefix], x)
    whole = _cut(function(x, positions), slice(0, prefix), key_axis)
    alone = function(part, positions[:, :prefix])
    _assert_close(alone, whole, atol, f"a prefix of {prefix} tokens differs alone and in the whole")


def assert_packed_equals_separate(
    function: Callable[[Tree, Array, Array], Array],
    x: Tree,
    lengths: Sequence[int],
    *,
    atol: float = ROUNDING,
    key_axis: int | None = None,
) -> None:
    """Documents packed into a row give what each gives alone, with padding behind it.

    Args:
      function: ``(x, positions, segment_ids)`` to ``y [B, T, ...]``. Positions begin at 0 in each
        document; segment ids count documents from 1, and padding is 0.
      x: rows of ``T`` tokens, the documents one after the other.
      lengths: tokens of each document; they sum to ``T`` or less.
      atol, key_axis: as in ``assert_prefix_unchanged``; outputs of other documents' keys are not
        compared.

    Raises ValueError if ``lengths`` are not positive or exceed ``T``.
    """
    length, batch = _length(x), jax.tree.leaves(x)[0].shape[0]
    if min(lengths, default=0) < 1 or sum(lengths) > length:
        raise ValueError(
            f"lengths {tuple(lengths)}: accepted: positive, their sum {length} at most"
        )

    def rows(parts: Sequence[int]) -> tuple[Array, Array]:
        positions, segments = np.zeros((2, batch, length), np.int32)
        starts = np.cumsum([0, *parts])
        for index, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            positions[:, start:stop] = np.arange(stop - start)
            segments[:, start:stop] = index + 1
        return positions, segments

    together, start = function(x, *rows(lengths)), 0
    for index, size in enumerate(lengths):
        first = jax.tree.map(lambda leaf, start=start: np.roll(leaf, -start, axis=1), x)
        alone = _cut(function(first, *rows([size])), slice(0, size), key_axis)
        inside = _cut(together, slice(start, start + size), key_axis)
        where = f"document {index + 1} ({size} tokens) differs alone and packed"
        _assert_close(inside, alone, atol, where)
        start += size


def assert_cached_equals_full(
    full: Callable[[Tree], Array],
    step: Callable[[Tree, Tree, int], tuple[Array, Tree]],
    x: Tree,
    cache: Tree,
    *,
    atol: float = ROUNDING,
) -> None:
    """Decoding token by token with a cache gives the outputs of the whole sequence at once.

    Args:
      full: ``x`` to ``y [B, T, ...]``.
      step: ``(cache, x of one token [B, 1, ...], its index t)`` to ``(y [B, 1, ...], cache)``.
      x: the whole sequence.
      cache: what ``step`` begins with.
      atol: largest difference allowed.
    """
    whole = np.asarray(full(x))
    for t in range(_length(x)):
        token = jax.tree.map(lambda leaf, t=t: leaf[:, t : t + 1], x)
        y, cache = step(cache, token, t)
        where = f"token {t} decoded with the cache differs from the whole sequence"
        _assert_close(y, whole[:, t : t + 1], atol, where)


def assert_norm_kept(rotate: Callable[[Array], Array], x: Array, *, atol: float = 1e-5) -> None:
    """A rotation keeps the Euclidean norm of each vector along the last axis.

    >>> assert_norm_kept(lambda x: x[..., ::-1], np.ones((1, 2, 4), np.float32))
    >>> assert_norm_kept(lambda x: 2 * x, np.ones((1, 2, 4), np.float32))
    Traceback (most recent call last):
      ...
    AssertionError: the norm changes ...
    """
    before, after = (np.linalg.norm(_float64(a), axis=-1) for a in (x, rotate(x)))
    _assert_close(after, before, atol, "the norm changes")


def assert_phases_accurate(
    tables: Callable[[Array], tuple[Array, Array]],
    inv_freq: np.ndarray,
    *,
    longest: int = FAR,
    atol: float = 1e-4,
) -> None:
    """Cosines and sines are those of float64, at powers of two and up to the last position.

    Args:
      tables: positions ``[1, T]`` to ``(cos, sin)``, each ``[1, T, F]``.
      inv_freq: ``[F]`` radians per token, float64.
      longest: the number of tokens; the last position is one less.
      atol: largest difference allowed.

    >>> inv_freq = np.array([1.0, 0.3])
    >>> def float32(positions):
    ...     phase = np.float32(positions[..., None]) * np.float32(inv_freq)
    ...     return np.cos(phase), np.sin(phase)
    >>> assert_phases_accurate(float32, inv_freq, longest=512)
    >>> assert_phases_accurate(float32, inv_freq)
    Traceback (most recent call last):
      ...
    AssertionError: cos of position * inv_freq, to position 1,048,575, ...
    """
    powers = 2 ** np.arange(longest.bit_length())
    last = np.arange(max(0, longest - 32), longest)
    positions = np.unique(np.concatenate([[0], powers, last]))
    positions = positions[positions < longest].astype(np.int32)[None]
    exact = positions[..., None] * np.asarray(inv_freq, np.float64)
    for name, table, function in zip(
        ("cos", "sin"), tables(positions), (np.cos, np.sin), strict=True
    ):
        where = (
            f"{name} of position * inv_freq, to position {longest - 1:,}, is not that of float64"
        )
        _assert_close(table, function(exact), atol, where)


def assert_gradients(
    function: Callable[..., Tree],
    *inputs: Tree,
    step: float = 1e-2,
    rtol: float = 1e-2,
    seed: int = 0,
) -> None:
    """Gradients are finite and agree with a central difference.

    The function's outputs are weighed by random numbers into one. The direction has random sizes
    and the signs of the gradient, so that the slope stands out from float32 rounding; where the
    gradient is 0, random signs. ``inputs`` are pytrees of floating arrays; close over the others.

    Args:
      function: of ``inputs``, differentiable; called under ``jit``.
      inputs: where to differentiate.
      step: of the difference, in units of the inputs.
      rtol: relative difference allowed between slope and difference quotient.
      seed: of the direction and the weights.
    """
    random = np.random.default_rng(seed)

    def like(tree: Tree) -> Tree:
        return jax.tree.map(lambda a: np.asarray(random.normal(size=a.shape), a.dtype), tree)

    weights = like(jax.eval_shape(function, *inputs))

    @jax.jit
    def value_and_gradient(inputs: Tree, direction: Tree, by: float) -> tuple[Array, Tree]:
        def weighted(inputs: Tree) -> Array:
            products = jax.tree.map(jnp.vdot, weights, function(*inputs))
            return sum(jax.tree.leaves(products), start=jnp.zeros(()))

        return jax.value_and_grad(weighted)(
            jax.tree.map(lambda a, d: a + (by * d).astype(a.dtype), inputs, direction)
        )

    gradient = value_and_gradient(inputs, like(inputs), 0.0)[1]
    require("chex", "dev").assert_tree_all_finite(gradient)
    direction = jax.tree.map(
        lambda d, g: np.where(np.asarray(g) == 0, d, np.abs(d) * np.sign(g)), like(inputs), gradient
    )
    ahead, behind = (float(value_and_gradient(inputs, direction, s)[0]) for s in (step, -step))
    dots = jax.tree.map(lambda g, d: float(np.vdot(_float64(g), _float64(d))), gradient, direction)
    slope = sum(jax.tree.leaves(dots))
    difference = (ahead - behind) / (2 * step)
    if not np.isclose(slope, difference, rtol=rtol, atol=0):
        raise AssertionError(
            f"the slope by the gradient is {slope:.6g}, a central difference with step "
            f"{step:g} gives {difference:.6g}"
        )


def _assert_close(actual: Tree, expected: Tree, atol: float, where: str) -> None:
    """All finite and within ``atol``; the error names the largest difference and its index."""
    chex = require("chex", "dev")
    actual, expected = np.asarray(actual), np.asarray(expected)
    chex.assert_equal_shape([actual, expected], custom_message=where)
    actual, expected = _float64(actual), _float64(expected)
    difference = np.abs(actual - expected)
    if difference.size and not np.max(difference) <= atol:  # also where it is NaN
        worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)
        index = tuple(map(int, worst))
        raise AssertionError(
            f"{where} by {difference[worst]:.3g} at {index}: {actual[worst]:.6g}, expected "
            f"{expected[worst]:.6g} within {atol:g}"
        )


def _float64(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _length(x: Tree) -> int:
    """``T``; raises ValueError unless all leaves are ``[B, T, ...]`` with one T of 2 or more."""
    lengths = {leaf.shape[1] if leaf.ndim > 1 else 0 for leaf in jax.tree.leaves(x)}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"x has lengths {sorted(lengths)}; accepted: arrays [B, T, ...], T above 1"
        )
    return lengths.pop()


def _cut(y: Array, tokens: slice, key_axis: int | None) -> np.ndarray:
    y = np.asarray(y)[:, tokens]
    if key_axis is None:
        return y
    index: list[slice] = [slice(None)] * y.ndim
    index[key_axis] = tokens
    return y[tuple(index)]
