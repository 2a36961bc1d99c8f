"""What a position embedding does to attention, as numbers: the rows of the gallery.

Nothing is trained here: methods are shown as ``init`` draws them, and content is random, so that
all that varies along a curve is the position.
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
from fope_jax.position.base import ModelShape, PositionEmbedding, Variables, bias_of_heads, has_hook
from fope_jax.position.registry import name_of
from fope_jax.position.rotation import inverse_frequencies
from fope_jax.typing import Array

logger = logging.getLogger(__name__)

KEYS = 8  # positions of the key within training that a curve is averaged over
DRAWS = 64  # random rows of gates for a contextual method
LOGITS = "E[q.k]/sqrt(H), logits"
BIAS = "attention bias, logits"
SIMILARITY = "cosine of two position vectors"
GATES = (-4.0, -2.0, 0.0)  # mean logits: about 1 token in 35 counts, 1 in 6, every other
RANGE = f"mean over {KEYS} key positions within training; grey: the range over them and heads"


def gallery_rows(labels: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """``gallery_row`` of each example method, or of those named.

    Args:
      labels: keys of ``EXAMPLES``; None takes all.

    Raises:
      ValueError: a label that is none, with the nearest.
    """
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

    Args:
      label: its title.
      method: the position embedding.
      shape: the model it serves.
      length: training length, tokens.
      reach: distances go to ``reach * length`` tokens.
      mean: of each entry of q and k, which are independent with variance 1.
      seed: of ``init`` and of all random draws.

    Returns:
      A dict with

      label, method, kind, summary: what it is.
      training_length, reach: as given.
      quantity: what the curve shows, one of ``LOGITS``, ``BIAS`` and ``SIMILARITY``.
      note: how it was computed.
      lines: dicts ``label, value``, a value for each distance 0, 1, .. tokens, and ``low, high``
        where it depends on the position of the key.
      frequencies: dicts ``label, values``, radians per token; empty where the method has none.
      parameters: dicts ``label, values``, a number for each head.
      others: texts about further variables.

    Raises:
      ValueError: the method cannot serve ``shape``.
    """
    method.check(shape)
    drawn = method.init(jax.random.key(seed), shape)
    model = {**drawn.model_params, **drawn.model_constants}
    first = drawn.at_layer(0)
    layer = method.layers()[0]
    if has_hook(layer.method, "embed"):
        quantity = SIMILARITY
        lines = [_similarity(layer.method, layer.select(model), shape, length, reach)]
        note = RANGE
    else:
        quantity, lines, note = _logit_lines(method, first, shape, length, reach, mean, seed)
    vectors, others = _variables(method, first, shape)
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
        "frequencies": _frequencies(method, first, shape),
        "parameters": vectors,
        "others": others,
    }


def _summary(value: Any) -> str:
    """A method or scaling with the knobs that differ from their defaults.

    >>> from fope_jax.position import RoPE
    >>> _summary(RoPE(theta=100.0))
    'RoPE(theta=100.0)'
    """
    changed = [
        f"{field.name}={_shown(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(changed)})"


def _shown(value: Any) -> str:
    """A knob's value; of long lists of numbers the first and the last."""
    if dataclasses.is_dataclass(value):
        return _summary(value)
    if not isinstance(value, tuple):
        return repr(value)
    if len(value) > 4:
        return f"({value[0]:g}, .., {value[-1]:g})"
    return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"


# ---------------------------------------------------------------------------- curves


def _logit_lines(
    method: PositionEmbedding,
    first: Variables,
    shape: ModelShape,
    length: int,
    reach: int,
    mean: float,
    seed: int,
) -> tuple[str, list[dict[str, Any]], str]:
    """The lines of every layer of a period, the quantity they show and how they were computed."""
    positions = np.arange((reach + 1) * length, dtype=np.int32)[None]
    period = len(method.layers())
    layers = []
    for layer in method.layers():
        own, variables = layer.method, layer.select(first)
        tables = own.tables(variables, positions, shape.head_dim)
        scale = np.ones((1, 1)) if layer.logit_scale is None else layer.logit_scale(positions)
        logits = expected_logits(
            own, variables, tables, shape, length, reach, mean, np.asarray(scale)[0]
        )
        layers.append((own, variables, logits))
    turning = any(np.ptp(logits) > 1e-4 * np.abs(logits).max() for *_, logits in layers)
    biased = all(has_hook(own, "bias") or has_hook(own, "contextual_bias") for own, *_ in layers)
    only_bias = biased and not turning
    notes = [] if only_bias else [f"closed form for independent q, k of N({mean:g}, 1)"]
    lines = []
    for index, (own, variables, logits) in enumerate(layers):
        prefix = f"layer {index + 1} of {period}, " if period > 1 else ""
        if only_bias:
            logits = np.zeros_like(logits)
        if has_hook(own, "bias"):
            logits = logits + biases(own, variables, reach * length, reach * length)[:, None]
        if has_hook(own, "contextual_bias"):
            notes.append(f"mean over {DRAWS} random rows; every entry of q is {mean:g}")
            for gate in GATES:
                added = contextual_biases(own, variables, shape, reach * length, mean, seed, gate)
                lines += _head_lines(f"{prefix}gates of N({gate:g}, 1), ", logits + added)
            continue
        lines += _head_lines(prefix, logits, each=has_hook(own, "bias"))
        if only_bias:
            within = biases(own, variables, length, length)[:, None]
            far = logits[..., : length + 1]
            if np.abs(within - far).max() > 1e-5 * np.abs(within).max():
                lines += _head_lines(f"{prefix}query at {length:,}, ", within)
                notes.append(f"query at {reach * length:,} where no other position is given")
    if any("low" in line for line in lines):
        notes.append(RANGE)
    return BIAS if only_bias else LOGITS, lines, "; ".join(dict.fromkeys(notes))


def expected_logits(
    method: PositionEmbedding,
    variables: Variables,
    tables: Any,
    shape: ModelShape,
    length: int,
    reach: int,
    mean: float,
    scale: np.ndarray | None = None,
) -> np.ndarray:
    """The expectation of a logit over independent random q and k, exactly.

        E[(A q).(C k)] = (A E[q]).(C E[k])

    for the linear maps A and C that the method applies to q and k at their positions.

    Args:
      method: of one layer.
      variables: the layer's and the model's.
      tables: of positions ``0 .. (reach + 1) * length - 1``.
      shape: the model's.
      length: training length, tokens; the ``KEYS`` keys stand within it.
      reach: the longest distance over the training length.
      mean: of each entry of q and k.
      scale: of the logits of each query, ``[count]`` or ``[1]``.

    Returns:
      ``[N, KEYS, reach * length + 1]`` logits: head, key, distance 0, 1, .. tokens.
    """
    count = (reach + 1) * length
    q = jnp.full((1, count, shape.num_heads, shape.head_dim), mean, jnp.float32)
    k = jnp.full((1, count, shape.num_kv_heads, shape.head_dim), mean, jnp.float32)
    q, k = (np.asarray(x[0], np.float64) for x in method.rotate(variables, tables, q, k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    if scale is not None:
        q = q * np.asarray(scale, np.float64)[:, None, None]
    places = key_positions(length)
    spans = [
        np.einsum("tnh,nh->nt", q[place : place + reach * length + 1], k[place]) for place in places
    ]
    return np.stack(spans, axis=1) / np.sqrt(shape.head_dim)


def key_positions(length: int) -> np.ndarray:
    """``KEYS`` positions spread over the training length, from 0.

    >>> key_positions(512).tolist()
    [0, 64, 128, 192, 256, 320, 384, 448]
    """
    return np.arange(KEYS) * length // KEYS


def biases(
    method: PositionEmbedding, variables: Variables, query: int, farthest: int
) -> np.ndarray:
    """The bias of one query for keys at distance 0 .. ``farthest``: ``[N, farthest + 1]``."""
    q_positions = np.full((1, 1), query, np.int32)
    k_positions = (query - np.arange(farthest + 1, dtype=np.int32))[None]
    bias = bias_of_heads(method, variables, q_positions, k_positions)
    return np.asarray(bias[0, :, 0], np.float64)


def contextual_biases(
    method: PositionEmbedding,
    variables: Variables,
    shape: ModelShape,
    farthest: int,
    mean: float,
    seed: int,
    gate: float,
) -> np.ndarray:
    """The mean bias of the last query over random rows of logits, by distance.

    Args:
      method: of one layer.
      variables: the layer's and the model's.
      shape: the model's.
      farthest: the longest distance, tokens.
      mean: every entry of q.
      seed: of the logits.
      gate: mean of the logits that open the gates; their standard deviation is 1.

    Returns:
      ``[farthest + 1]`` logits, the mean over heads and ``DRAWS`` rows as well.
    """
    heads = shape.num_heads
    q = jnp.full((DRAWS, 1, heads, shape.head_dim), mean, jnp.float32)
    logits = gate + jax.random.normal(jax.random.key(seed), (DRAWS, heads, 1, farthest + 1))
    bias: Array = method.contextual_bias(variables, q, logits)
    return np.asarray(bias, np.float64).mean(axis=(0, 1, 2))[::-1]


def _similarity(
    method: PositionEmbedding, model: Variables, shape: ModelShape, length: int, reach: int
) -> dict[str, Any]:
    """Cosine between position vectors; distances end where the method does."""
    limit = method.limits.max_length or (reach + 1) * length
    positions = np.arange(min(limit, (reach + 1) * length), dtype=np.int32)[None]
    x = jnp.zeros((1, positions.shape[1], shape.d_model), jnp.float32)
    vectors = np.asarray(method.embed(model, x, positions)[0], np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    far = min(limit - 1, reach * length)
    values = np.full((KEYS, far + 1), np.nan)
    for row, place in zip(values, key_positions(length), strict=True):
        span = vectors[place : place + far + 1]
        row[: len(span)] = span @ vectors[place]
    return _line("token embeddings", values)


def _head_lines(prefix: str, values: np.ndarray, *, each: bool = True) -> list[dict[str, Any]]:
    """A line for each head, or one where all are alike, of ``[N, keys, distance]`` values.

    Without ``each`` heads that differ make one line as well: their mean, and their range.
    """
    middle = values.mean(axis=1)
    if np.ptp(middle, axis=0).max() <= 1e-5 * np.abs(middle).max():
        return [_line(f"{prefix}all heads", values[0])]
    if not each:
        return [_line(f"{prefix}mean over heads", values.reshape(-1, values.shape[-1]))]
    return [_line(f"{prefix}head {head + 1}", rows) for head, rows in enumerate(values)]


def _line(label: str, values: np.ndarray) -> dict[str, Any]:
    """A line of ``[keys, distance]`` values, NaN where a key has no query so far away."""
    middle, low, high = (f(values, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
    line: dict[str, Any] = {"label": label, "value": _rounded(middle)}
    if np.max(high - low) > 1e-3 * np.max(np.abs(middle)):
        line |= {"low": _rounded(low), "high": _rounded(high)}
    return line


def _rounded(values: np.ndarray) -> list[float]:
    """Seven digits: what float32 holds, without the noise of the platform."""
    return [float(f"{value:.6e}") for value in values]


# ---------------------------------------------------------------------------- spectra


def _frequencies(
    method: PositionEmbedding, first: Variables, shape: ModelShape
) -> list[dict[str, Any]]:
    """Frequencies in radians per token of each layer of a period that has some."""
    if isinstance(method, Sinusoidal):
        own = inverse_frequencies(shape.d_model, method.theta)
        return [{"label": "of the token embedding", "values": _rounded(own)}]
    period = len(method.layers())
    series = []
    for index, layer in enumerate(method.layers()):
        values = layer.method.frequencies(shape.head_dim)
        if values is None:
            continue
        prefix = f"layer {index + 1} of {period}" if period > 1 else ""
        series.append({"label": prefix or "fixed", "values": _rounded(np.asarray(values))})
        for name, extra in layer.select(first).items():
            if name.endswith("extra_frequencies"):
                drawn = np.sort(np.asarray(extra, np.float64))[::-1]
                label = f"{prefix}, random" if prefix else "random"
                series.append({"label": label, "values": _rounded(drawn)})
    return series


def _variables(
    method: PositionEmbedding, first: Variables, shape: ModelShape
) -> tuple[list[dict[str, Any]], list[str]]:
    """What has one number a head, and in a few words everything else."""
    vectors, others = [], []
    for name, value in first.items():
        array = np.asarray(value, np.float64)
        if array.shape == (shape.num_heads,):
            vectors.append({"label": name, "values": _rounded(array)})
        elif not name.endswith("extra_frequencies"):
            size = " x ".join(map(str, array.shape)) or "one number"
            others.append(f"{name}: {size}, {array.mean():.3g} ± {array.std():.3g}")
    return vectors, others
