"""What each position embedding does to attention, as numbers for the gallery's figures.

Nothing is trained: variables are as drawn by ``init``, and q and k are random, so a curve varies
with position only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fope_jax.gallery.examples import LENGTH, SHAPE, choose
from fope_jax.position.absolute import Sinusoidal
from fope_jax.position.base import (
    Layer,
    ModelShape,
    PositionEmbedding,
    Variables,
    bias_of_heads,
    has_hook,
)
from fope_jax.position.registry import name_of
from fope_jax.position.rotation import inverse_frequencies
from fope_jax.typing import Array

logger = logging.getLogger(__name__)

KEYS = 8  # positions of the key within training that a curve is averaged over
DRAWS = 64  # random rows of gates for a contextual method
TEXTS = 16  # random rows of a layer's input for a running bias
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)  # of N(0, 1)
LOGITS = "E[q.k]/sqrt(H), logits"
BIAS = "attention bias, logits"
SIMILARITY = "cosine of two position vectors"
GATES = (-4.0, -2.0, 0.0)  # mean gate logits: 1 token in 35, 1 in 6 and 1 in 2 counts
RANGE = f"mean over {KEYS} key positions within training; grey: the range over them and heads"


def gallery_rows(labels: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """``gallery_row`` of the labelled examples, or of all; ValueError for an unknown label."""
    rows = []
    for label, method in choose(labels).items():
        logger.info("%s", label)
        rows.append(gallery_row(label, method))
    return rows


def gallery_row(
    label: str,
    method: PositionEmbedding,
    *,
    shape: ModelShape = SHAPE,
    length: int = LENGTH,
    reach: int = 4,
    mean: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """One method's curve against distance and its spectrum, ready for JSON.

    Distances go to ``reach`` times the training length. Entries of q and k are independent with the
    given ``mean`` and variance 1. ``seed`` is for ``init`` and all draws.

    Returns a dict with these keys:
      label, method, kind, summary, training_length, reach: as given, or what the method is.
      quantity: what the curve shows: ``LOGITS``, ``BIAS`` or ``SIMILARITY``.
      note: how it was computed.
      lines: dicts ``label, value``, one value per distance 0, 1, .. tokens, with ``low, high`` if
        it varies with the key's position.
      frequencies: dicts ``label, values``, radians per token.
      parameters: dicts ``label, values``, one number per head.
      others: texts about further variables.

    Raises ValueError if the method cannot serve ``shape``.
    """
    method.check(shape)
    variables = method.init(jax.random.key(seed), shape).at_layer(0)
    layers = [(layer, layer.select(variables)) for layer in method.layers()]
    if has_hook(layers[0][0].method, "embed"):
        quantity, note = SIMILARITY, RANGE
        lines = [_similarity(layers[0][0].method, layers[0][1], shape, length, reach)]
    else:
        quantity, lines, note = _logit_lines(layers, shape, length, reach, mean, seed)
    parameters, others = [], []
    for name, value in variables.items():
        values = np.asarray(value, np.float64)
        if values.shape == (shape.num_heads,):
            parameters.append({"label": name, "values": _rounded(values)})
        elif not name.endswith("extra_frequencies"):
            size = " x ".join(map(str, values.shape)) or "one number"
            others.append(f"{name}: {size}, {values.mean():.3g} ± {values.std():.3g}")
    return {
        "label": label,
        "method": name_of(method),
        "kind": method.kind,
        "summary": _summary(method),
        "training_length": length,
        "reach": reach,
        "quantity": quantity,
        "note": note,
        "lines": lines,
        "frequencies": _frequencies(method, layers, shape),
        "parameters": parameters,
        "others": others,
    }


def _summary(value: Any) -> str:
    """A method or scaling with its non-default knobs.

    >>> from fope_jax.position import RoPE
    >>> _summary(RoPE(theta=100.0))
    'RoPE(theta=100.0)'
    """

    def text(knob: Any) -> str:
        if dataclasses.is_dataclass(knob):
            return _summary(knob)
        if not isinstance(knob, tuple):
            return repr(knob)
        if len(knob) > 4:  # a long list: its first and last number
            return f"({knob[0]:g}, .., {knob[-1]:g})"
        return f"({', '.join(map(text, knob))}{',' if len(knob) == 1 else ''})"

    changed = [
        f"{field.name}={text(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


# ---------------------------------------------------------------------------- curves


def _logit_lines(
    layers: list[tuple[Layer, Variables]],
    shape: ModelShape,
    length: int,
    reach: int,
    mean: float,
    seed: int,
) -> tuple[str, list[dict[str, Any]], str]:
    """The quantity, lines and note of a period's layers; pure biases omit random logits."""
    farthest = reach * length
    logits = [_expected_logits(*layer, shape, length, reach, mean) for layer in layers]
    is_bias = [has_hook(layer.method, "bias") for layer, _ in layers]
    is_contextual = [has_hook(layer.method, "contextual_bias") for layer, _ in layers]
    is_running = [has_hook(layer.method, "running_bias") for layer, _ in layers]
    turns = any(np.ptp(values) > 1e-4 * np.abs(values).max() for values in logits)
    only_bias = not turns and all(np.any([is_bias, is_contextual, is_running], axis=0))
    notes = [] if only_bias else [f"closed form for independent q, k of N({mean:g}, 1)"]
    lines = []
    for index, (layer, variables) in enumerate(layers):
        prefix = f"layer {index + 1} of {len(layers)}, " if len(layers) > 1 else ""
        values = np.zeros_like(logits[index]) if only_bias else logits[index]
        if is_bias[index]:
            values = values + biases(layer.method, variables, farthest, farthest)[:, None]
        if is_running[index]:
            notes.append(f"mean over {TEXTS} random texts, the layer's input of N(0, 1)")
            texts = (TEXTS, farthest + 1, shape.d_model)
            x = jax.random.normal(jax.random.key(seed), texts)
            increments = np.asarray(layer.method.running_bias(variables, x), np.float64)
            increments[:, 0] = 0  # the key's own
            values = values + np.cumsum(increments.mean(axis=0), axis=0).T[:, None]
        values = _seen(layer, values, length)
        if is_contextual[index]:
            notes.append(f"mean over {DRAWS} random rows; every entry of q is {mean:g}")
            q = jnp.full((DRAWS, 1, shape.num_heads, shape.head_dim), mean, jnp.float32)
            rows = (DRAWS, shape.num_heads, 1, farthest + 1)
            for gate in GATES:
                drawn = gate + jax.random.normal(jax.random.key(seed), rows)
                bias: Array = layer.method.contextual_bias(variables, q, drawn)
                by_distance = np.asarray(bias, np.float64).mean(axis=(0, 1, 2))[::-1]
                by_distance = by_distance[: values.shape[-1]]
                lines += _head_lines(f"{prefix}gates of N({gate:g}, 1), ", values + by_distance)
            continue
        seen = [tokens for tokens in (layer.window, layer.chunk) if tokens is not None]
        if seen:  # the line ends where no key is seen
            notes.append(f"{prefix}a query sees at most {min(seen):,} tokens")
        lines += _head_lines(prefix, values, each=is_bias[index] or is_running[index])
        if only_bias and is_bias[index]:
            near = biases(layer.method, variables, length, length)[:, None]
            near = _seen(layer, near, length)
            change = near - values[..., : near.shape[-1]]
            if np.nanmax(np.abs(change)) > 1e-5 * np.nanmax(np.abs(near)):
                lines += _head_lines(f"{prefix}query at {length:,}, ", near)
                notes.append(f"query at {farthest:,} where no other position is given")
    if any("low" in line for line in lines):
        notes.append(RANGE)
    return BIAS if only_bias else LOGITS, lines, "; ".join(dict.fromkeys(notes))


def _expected_logits(
    layer: Layer, variables: Variables, shape: ModelShape, length: int, reach: int, mean: float
) -> np.ndarray:
    """The expected logits ``[N, KEYS, reach * length + 1]``: head, key, distance."""
    # q and k are independent, so E[q'.k'] = E[q'].E[k'] for what the method makes of them. The mean
    # over rows that are one number everywhere is exact where the method is linear, and where each
    # entry of q' is made of one entry of q (PoPE).
    count = (reach + 1) * length
    positions = np.arange(count, dtype=np.int32)[None]
    tables = layer.method.tables(variables, positions, shape.head_dim)
    means = []
    for node, weight in zip(NODES, WEIGHTS / WEIGHTS.sum(), strict=True):
        q, k = (
            jnp.full((1, count, heads, shape.head_dim), mean + node, jnp.float32)
            for heads in (shape.num_heads, shape.num_kv_heads)
        )
        rotated = layer.method.rotate(variables, tables, q, k)
        means.append([weight * np.asarray(x[0], np.float64) for x in rotated])
    q, k = (np.sum(parts, axis=0) for parts in zip(*means, strict=True))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    if layer.logit_scale is not None:
        q = q * np.asarray(layer.logit_scale(positions), np.float64)[0][:, None, None]

    def spans(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        rows = [
            np.einsum("tnh,nh->nt", q[key : key + reach * length + 1], k[key])
            for key in _key_positions(length)
        ]
        return np.stack(rows, axis=1) / np.sqrt(shape.head_dim)

    if layer.far_from is None:
        return spans(q, k)
    near, far = (spans(*x) for x in zip(*(np.split(x, 2, axis=-1) for x in (q, k)), strict=True))
    return np.where(np.arange(near.shape[-1]) < layer.far_from, near, far)


def _seen(layer: Layer, values: np.ndarray, length: int) -> np.ndarray:
    """``[N, keys, distance]`` up to the last distance that a window or a chunk shows; NaN where the
    key's chunk has ended."""
    distances = np.arange(values.shape[-1])
    if layer.chunk is not None:
        ends = layer.chunk - _key_positions(length) % layer.chunk
        values = np.where(distances < ends[:, None], values, np.nan)
    reach = min(x for x in (layer.window, layer.chunk, len(distances)) if x is not None)
    return values[..., :reach]


def _key_positions(length: int) -> np.ndarray:
    """``KEYS`` positions spread over the training length, from 0."""
    return np.arange(KEYS) * length // KEYS


def biases(
    method: PositionEmbedding, variables: Variables, query: int, farthest: int
) -> np.ndarray:
    """The bias of one query for keys at distance 0 .. ``farthest``: ``[N, farthest + 1]``."""
    q_positions = np.full((1, 1), query, np.int32)
    k_positions = (query - np.arange(farthest + 1, dtype=np.int32))[None]
    bias = bias_of_heads(method, variables, q_positions, k_positions)
    return np.asarray(bias[0, :, 0], np.float64)


def _similarity(
    method: PositionEmbedding, variables: Variables, shape: ModelShape, length: int, reach: int
) -> dict[str, Any]:
    """Cosine between position vectors, up to the method's length limit."""
    limit = method.limits.max_length or (reach + 1) * length
    positions = np.arange(min(limit, (reach + 1) * length), dtype=np.int32)[None]
    x = jnp.zeros((1, positions.shape[1], shape.d_model), jnp.float32)
    vectors = np.asarray(method.embed(variables, x, positions)[0], np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    far = min(limit - 1, reach * length)
    values = np.full((KEYS, far + 1), np.nan)
    for row, key in zip(values, _key_positions(length), strict=True):
        span = vectors[key : key + far + 1]
        row[: len(span)] = span @ vectors[key]
    return _line("token embeddings", values)


def _head_lines(prefix: str, values: np.ndarray, *, each: bool = True) -> list[dict[str, Any]]:
    """Lines of ``[N, keys, distance]`` values: one per head, or one for all."""
    means = np.nanmean(values, axis=1)
    if np.ptp(means, axis=0).max() <= 1e-5 * np.abs(means).max():
        return [_line(f"{prefix}all heads", values[0])]
    if not each:
        return [_line(f"{prefix}mean over heads", values.reshape(-1, values.shape[-1]))]
    return [_line(f"{prefix}head {head + 1}", rows) for head, rows in enumerate(values)]


def _line(label: str, values: np.ndarray) -> dict[str, Any]:
    """A line of ``[keys, distance]`` values, NaN where a key has no query at that distance."""
    mean, low, high = (f(values, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
    line: dict[str, Any] = {"label": label, "value": _rounded(mean)}
    if np.max(high - low) > 1e-3 * np.max(np.abs(mean)):
        line |= {"low": _rounded(low), "high": _rounded(high)}
    return line


def _rounded(values: np.ndarray) -> list[float]:
    """Seven digits, float32's precision, so that platforms agree."""
    return [float(f"{value:.6e}") for value in values]


def _frequencies(
    method: PositionEmbedding, layers: list[tuple[Layer, Variables]], shape: ModelShape
) -> list[dict[str, Any]]:
    """Frequencies in radians per token of each layer of a period that has some."""
    if isinstance(method, Sinusoidal):
        values = inverse_frequencies(shape.d_model, method.theta)
        return [{"label": "of the token embedding", "values": _rounded(values)}]
    series = []
    for index, (layer, variables) in enumerate(layers):
        values = layer.method.frequencies(shape.head_dim)
        if values is None:
            continue
        prefix = f"layer {index + 1} of {len(layers)}" if len(layers) > 1 else ""
        series.append({"label": prefix or "fixed", "values": _rounded(np.asarray(values))})
        for name, extra in variables.items():
            if name.endswith("extra_frequencies"):
                descending = np.sort(np.asarray(extra, np.float64))[::-1]
                label = f"{prefix}, random" if prefix else "random"
                series.append({"label": label, "values": _rounded(descending)})
    return series
