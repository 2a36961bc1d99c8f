"""FoPE in the keys and tensors that serving engines read: vLLM, SGLang, LMDeploy and XTuner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fope_jax.interop.keys import SHARE, THETA, flag, integer, uniform
from fope_jax.position import (
    FoPE,
    ModelShape,
    PositionVariables,
    floor_frequency,
    inverse_frequencies,
)

PREFIX = "model.rotary_emb."
FOPE_KEYS = ("use_fope", "num_inv_freq", "fope_sep_head", "fope_init_factor")
SPELLINGS = {"fope_num_inv_freq": "num_inv_freq", "fope_sep_heads": "fope_sep_head"}


def says_fope(parameters: Mapping[str, Any]) -> bool:
    """Whether ``rope_parameters`` have a key of FoPE; ``"use_fope": False`` makes the others idle.

    >>> says_fope({"num_inv_freq": 16}), says_fope({"num_inv_freq": 16, "use_fope": False})
    (True, False)
    """
    given = {SPELLINGS.get(key, key) for key, value in parameters.items() if value is not None}
    return bool(given.intersection(FOPE_KEYS)) and parameters.get("use_fope") is not False


def fope_from_rope_parameters(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    training_length: int | None = None,
    rope_theta: float | None = None,
) -> FoPE:
    """The FoPE that vLLM, SGLang, LMDeploy and XTuner make of these ``rope_parameters``.

        cos[t, h, m] = sum_w cos_coef[h, w, m] cos(w t)  for m < D,  else 1;  the sine likewise

    They mix the first ``num_inv_freq`` frequencies, or those above the floor of
    ``max_position_embeddings``, into as many pairs (D = d), with a matrix for each key-value head
    that all layers share. Coefficients come from ``fope_coefficients_from_serving``.

    Args:
      parameters: with ``fope_sep_head`` and ``fope_init_factor``; ``num_inv_freq`` may be left out.
      head_dim: H.
      training_length: tokens, which fix the floor: the configuration's
        ``max_position_embeddings``. May be left out with ``num_inv_freq``; the shortest length that
        keeps as many frequencies is then taken.
      rope_theta: the base, where the parameters do not hold it.

    Raises:
      ValueError: a key is unknown, missing, of the wrong kind, or contradicts another or an
        argument.

    >>> keys = {"rope_type": "default", "rope_theta": 10_000.0, "num_inv_freq": 16}
    >>> keys |= {"fope_sep_head": True, "fope_init_factor": 0.3}
    >>> fope_from_rope_parameters(keys, head_dim=64).training_length
    472

    Reference: ``FourierRotaryEmbedding`` of vLLM and SGLang, ``FourierEmbedding`` of XTuner, and
    ``FopeRotaryEmbedding`` of LMDeploy, of 2026.
    """
    entries = {key: value for key, value in parameters.items() if value is not None}
    spelled = {SPELLINGS.get(key, key): value for key, value in entries.items()}
    for key, name in SPELLINGS.items():
        if key in entries and entries.get(name, entries[key]) != entries[key]:
            raise ValueError(
                f"{key!r} is {entries[key]!r}, {name!r} is {entries[name]!r}: two spellings "
                "of one key"
            )
    types = ("default", "fope")
    given = uniform(spelled, types, dict.fromkeys(types, FOPE_KEYS))
    theta = given.theta(rope_theta)
    if given.entries.get(SHARE, 1) != 1:
        raise ValueError(f"{SHARE!r} is {given.entries[SHARE]!r}: FoPE turns the whole head, 1")
    if not flag("use_fope", given.entries.get("use_fope", True)):
        raise ValueError("'use_fope' is False: this is no FoPE, use from_rope_parameters")
    separate = flag("fope_sep_head", given.value("fope_sep_head"))
    sigma = given.number("fope_init_factor", "it is the strength of the noise, sigma")
    grid = inverse_frequencies(head_dim, theta)
    count = given.entries.get("num_inv_freq")
    if count is not None:
        count = integer("num_inv_freq", count)
        if not 1 <= count <= len(grid):
            raise ValueError(
                f"'num_inv_freq' is {count}: head_dim={head_dim} has 1 to {len(grid)} frequencies"
            )
    if count is None:
        if training_length is None:
            raise ValueError(
                "'num_inv_freq' is missing: the floor decides, pass training_length, the "
                "configuration's max_position_embeddings"
            )
        _check_floor(grid, training_length)
    elif training_length is None:
        training_length = _shortest_length(grid, count)
    elif _count(grid, training_length) != count:
        raise ValueError(
            f"'num_inv_freq' is {count}, training_length={training_length} keeps "
            f"{_count(grid, training_length)} frequencies of head_dim={head_dim}, "
            f"rope_theta={theta:g}: leave one out"
        )
    return FoPE(
        training_length,
        theta=theta,
        sigma=sigma,
        heads="key_value" if separate else "shared",
        share_layers=True,
        outputs="surviving",
    )


def fope_to_rope_parameters(method: FoPE, shape: ModelShape) -> dict[str, Any]:
    """The keys with which vLLM, SGLang, LMDeploy and XTuner compute this FoPE.

    ``num_inv_freq`` is always written, so that the engines' ``max_position_embeddings`` is free to
    be the length to serve. With ``heads="shared"`` they get ``fope_sep_head: False``, which vLLM
    and SGLang fail to run (vLLM issue 55204); XTuner runs it.

    Args:
      method: FoPE.
      shape: of the model.

    Raises:
      ValueError: a knob that the engines cannot say.

    >>> shape = ModelShape(d_model=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64)
    >>> fope = FoPE(512, share_layers=True, outputs="surviving")
    >>> fope_to_rope_parameters(fope, shape)["num_inv_freq"]
    16

    Reference: as ``fope_from_rope_parameters``.
    """
    check_served(method, shape)
    return {
        "rope_type": "default",
        THETA: method.theta,
        "use_fope": True,
        "num_inv_freq": method.num_outputs(shape.head_dim),
        "fope_sep_head": method.heads != "shared",
        "fope_init_factor": method.sigma,
    }


def check_served(method: FoPE, shape: ModelShape) -> None:
    """Raises ValueError, naming the knob, where engines cannot compute ``method``."""
    method.check(shape)
    if not method.series:
        raise ValueError("series=False: engines know FoPE with the series only")
    for knob, needed in (("frequencies_from", "rope"), ("normalise", False), ("scaling", ())):
        if getattr(method, knob) != needed:
            raise ValueError(f"{knob}={getattr(method, knob)!r}: engines know {needed!r} only")
    if method.heads == "query" and shape.num_heads != shape.num_kv_heads:
        raise ValueError(
            f"heads='query' with {shape.num_heads} query and {shape.num_kv_heads} key-value heads: "
            "engines hold a matrix for each key-value head, heads='key_value'"
        )
    if not method.share_layers and shape.num_layers > 1:
        raise ValueError(
            f"share_layers=False with {shape.num_layers} layers: engines hold one set of "
            "coefficients for all layers"
        )
    mixed, outputs = method.frequencies(shape.head_dim), method.num_outputs(shape.head_dim)
    if len(mixed) != outputs:
        raise ValueError(
            f"outputs={method.outputs!r} mixes {len(mixed)} frequencies into {outputs} pairs of "
            f"head_dim={shape.head_dim}: engines mix as many as there are pairs, "
            "outputs='surviving'"
        )
    if not mixed.all():
        raise ValueError("drop_zero=False: engines mix no zero frequency")
    if method.zero_sine != 1 and outputs < shape.head_dim // 2:
        raise ValueError(
            f"zero_sine={method.zero_sine:g}: engines pad the sine of the "
            f"{shape.head_dim // 2 - outputs} pairs without a series with 1"
        )
    if method.sigma_convention != "xavier":
        raise ValueError(
            f"sigma_convention={method.sigma_convention!r}: fope_init_factor is the gain of a "
            "Xavier initialiser, sigma_convention='xavier'"
        )


def fope_coefficients_to_serving(
    method: FoPE, variables: PositionVariables, shape: ModelShape, prefix: str = PREFIX
) -> dict[str, np.ndarray]:
    """FoPE's coefficients under the names and in the layout of serving engines.

    Args:
      method: FoPE.
      variables: what ``method.init`` drew, or a checkpoint restored.
      shape: of the model.
      prefix: of the names; multimodal models have ``"model.language_model.rotary_emb."``.

    Returns:
      ``cos_coef`` and ``sin_coef``, float32 ``[K, D, D]``, or ``[D, D]`` with ``heads="shared"``:
      rows are frequencies, fastest first, columns are pairs.

    Raises:
      ValueError: a knob that the engines cannot say, or layers that differ.

    Reference: as ``fope_from_rope_parameters``.
    """
    check_served(method, shape)
    owned = variables.layer_constants | variables.layer_params
    exported = {}
    for name in ("cos_coef", "sin_coef"):
        layers = np.asarray(owned[name if name in owned else "cos_coef"], np.float32)
        if (layers != layers[0]).any():
            raise ValueError(f"{name} differs between layers: engines hold one for all layers")
        exported[prefix + name] = layers[0]
    return exported


def fope_coefficients_from_serving(
    method: FoPE, tensors: Mapping[str, Any], shape: ModelShape, prefix: str = PREFIX
) -> PositionVariables:
    """FoPE's variables from the tensors of a checkpoint for serving engines.

    Args:
      method: FoPE, as ``fope_from_rope_parameters`` gives it.
      tensors: names to arrays; others than the two are left alone.
      shape: of the model.
      prefix: see ``fope_coefficients_to_serving``.

    Returns:
      Variables in place of what ``method.init`` draws.

    Raises:
      ValueError: a tensor is missing, or has another shape than the method's.

    Reference: as ``fope_from_rope_parameters``.
    """
    check_served(method, shape)
    count = method.num_outputs(shape.head_dim)
    needed = (count, count) if method.heads == "shared" else (shape.num_kv_heads, count, count)
    coefficients = {}
    for name in ("cos_coef", "sin_coef"):
        if prefix + name not in tensors:
            same = [repr(other) for other in tensors if other.endswith(f".{name}")]
            hint = f"; did you mean {' or '.join(same)}? Then pass its prefix" if same else ""
            raise ValueError(f"{prefix + name!r} is missing{hint}")
        value = np.asarray(tensors[prefix + name], np.float32)
        if value.shape != needed:
            raise ValueError(f"{prefix + name!r} has shape {value.shape}: expected {needed}")
        coefficients[name] = jnp.broadcast_to(jnp.asarray(value), (shape.num_layers, *needed))
    if not method.separate_sine:
        raise ValueError("separate_sine=False: engines hold a matrix for the sine; True reads both")
    if method.learnable:
        return PositionVariables(layer_params=coefficients)
    return PositionVariables(layer_constants=coefficients)


def _count(grid: np.ndarray, training_length: int) -> int:
    """How many frequencies FoPE keeps."""
    return int((grid >= floor_frequency(training_length)).sum())


def _shortest_length(grid: np.ndarray, count: int) -> int:
    """The shortest training length in tokens that keeps ``count`` frequencies.

    Raises:
      ValueError: there is none.
    """
    length = math.ceil(2 * math.pi / grid[count - 1])
    if _count(grid, length) < count:  # rounding, where a whole number of tokens is one period
        length += 1
    if _count(grid, length) != count:
        raise ValueError(
            f"'num_inv_freq' is {count}: {length - 1} tokens keep fewer frequencies, {length} keep "
            f"{_count(grid, length)}; FoPE keeps those above the floor of a training length"
        )
    return length


def _check_floor(grid: np.ndarray, training_length: int) -> None:
    """Raises ValueError unless engines, comparing strictly in float32, keep what FoPE keeps."""
    floor = floor_frequency(training_length)
    kept = _count(grid, training_length)
    if not kept:
        raise ValueError(
            f"training_length={training_length}: no frequency completes a period within it; "
            f"{math.ceil(2 * math.pi / grid[0])} tokens or more keep one"
        )
    if int((grid.astype(np.float32) > np.float32(floor)).sum()) != kept:
        raise ValueError(
            f"training_length={training_length}: frequency {kept - 1} is on the floor, which "
            "rounding decides; pass 'num_inv_freq' and no training_length"
        )
