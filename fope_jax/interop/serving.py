"""FoPE in the keys and tensors of serving engines: vLLM, SGLang, LMDeploy and XTuner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fope_jax.interop.rope_parameters import (
    FOPE_KEYS,
    FOPE_SPELLINGS,
    PARTIAL,
    THETA,
    flag,
    integer,
    number,
    read_keys,
    read_theta,
)
from fope_jax.position import (
    FoPE,
    ModelShape,
    PositionVariables,
    floor_frequency,
    inverse_frequencies,
)

PREFIX = "model.rotary_emb."
COEFFICIENTS = ("cos_coef", "sin_coef")


def fope_from_rope_parameters(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    training_length: int | None = None,
    rope_theta: float | None = None,
) -> FoPE:
    """The FoPE that vLLM, SGLang, LMDeploy and XTuner compute from these ``rope_parameters``.

        cos[t, h, m] = sum_w cos_coef[h, w, m] cos(w t)  for m < D,  else 1;  the sine likewise

    A matrix per key-value head, shared by all layers, mixes D frequencies into D pairs: the first
    ``num_inv_freq``, or those above the floor of ``max_position_embeddings``.

    Args:
      parameters: with ``fope_sep_head`` and ``fope_init_factor``; ``num_inv_freq`` is optional.
      head_dim: H.
      training_length: ``max_position_embeddings`` in tokens, which sets the floor. None takes the
        shortest length that keeps ``num_inv_freq`` frequencies.
      rope_theta: the base, if not in the parameters.

    Raises ValueError if a key is unknown, missing, of the wrong kind, or contradicts another or an
    argument.

    >>> keys = {"rope_type": "default", "rope_theta": 10_000.0, "num_inv_freq": 16}
    >>> keys |= {"fope_sep_head": True, "fope_init_factor": 0.3}
    >>> fope_from_rope_parameters(keys, head_dim=64).training_length
    472

    Reference: ``FourierRotaryEmbedding`` of vLLM and SGLang, ``FourierEmbedding`` of XTuner, and
    ``FopeRotaryEmbedding`` of LMDeploy, of 2026.
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    for key, name in FOPE_SPELLINGS.items():
        if key in given and given.get(name, given[key]) != given[key]:
            raise ValueError(
                f"{key!r} is {given[key]!r}, {name!r} is {given[name]!r}: two spellings of one key"
            )
    uniform = {FOPE_SPELLINGS.get(key, key): value for key, value in given.items()}
    _, keys = read_keys(uniform, dict.fromkeys(("default", "fope"), FOPE_KEYS))
    theta = read_theta(keys, rope_theta)
    if keys.get(PARTIAL, 1) != 1:
        raise ValueError(f"{PARTIAL!r} is {keys[PARTIAL]!r}: FoPE rotates the whole head, 1")
    if not flag("use_fope", keys.get("use_fope", True)):
        raise ValueError("'use_fope' is False: this is no FoPE, use from_rope_parameters")
    for key in ("fope_sep_head", "fope_init_factor"):
        if key not in keys:
            raise ValueError(
                f"{key!r} is missing: FoPE needs it; fope_init_factor is the strength of the "
                "noise, sigma"
            )
    grid = inverse_frequencies(head_dim, theta)
    training_length = _training_length(grid, keys.get("num_inv_freq"), training_length, theta)
    return FoPE(
        training_length,
        theta=theta,
        sigma=number("fope_init_factor", keys["fope_init_factor"]),
        heads="key_value" if flag("fope_sep_head", keys["fope_sep_head"]) else "shared",
        share_layers=True,
        outputs="surviving",
    )


def _training_length(
    grid: np.ndarray, count: Any, training_length: int | None, theta: float
) -> int:
    """The training length that keeps ``count`` frequencies, also in the engines' float32."""

    def num_kept(length: int) -> int:
        return int((grid >= floor_frequency(length)).sum())

    if count is None:
        if training_length is None:
            raise ValueError(
                "'num_inv_freq' is missing: the floor decides, pass training_length, the "
                "configuration's max_position_embeddings"
            )
        kept = num_kept(training_length)
        if not kept:
            raise ValueError(
                f"training_length={training_length}: no frequency completes a period within it; "
                f"{math.ceil(2 * math.pi / grid[0])} tokens or more keep one"
            )
        floor = np.float32(floor_frequency(training_length))
        if (grid.astype(np.float32) > floor).sum() != kept:
            raise ValueError(
                f"training_length={training_length}: frequency {kept - 1} is on the floor, which "
                "rounding decides; pass 'num_inv_freq' and no training_length"
            )
        return training_length
    count = integer("num_inv_freq", count)
    if not 1 <= count <= len(grid):
        raise ValueError(
            f"'num_inv_freq' is {count}: head_dim={2 * len(grid)} has 1 to {len(grid)} frequencies"
        )
    if training_length is not None:
        if num_kept(training_length) != count:
            raise ValueError(
                f"'num_inv_freq' is {count}, training_length={training_length} keeps "
                f"{num_kept(training_length)} frequencies of head_dim={2 * len(grid)}, "
                f"rope_theta={theta:g}: leave one out"
            )
        return training_length
    length = math.ceil(2 * math.pi / grid[count - 1])
    length += num_kept(length) < count  # rounding, if a period is a whole number of tokens
    if num_kept(length) != count:
        raise ValueError(
            f"'num_inv_freq' is {count}: {length - 1} tokens keep fewer frequencies, {length} keep "
            f"{num_kept(length)}; FoPE keeps those above the floor of a training length"
        )
    return length


def fope_to_rope_parameters(method: FoPE, shape: ModelShape) -> dict[str, Any]:
    """The keys with which vLLM, SGLang, LMDeploy and XTuner compute this FoPE.

    ``num_inv_freq`` is always written, so ``max_position_embeddings`` may be the length to serve.
    ``heads="shared"`` becomes ``fope_sep_head: False``, which XTuner runs and vLLM and SGLang fail
    on (vLLM issue 55204). ValueError for a knob that the engines do not have.

    >>> shape = ModelShape(d_model=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64)
    >>> fope = FoPE(512, share_layers=True, outputs="surviving")
    >>> fope_to_rope_parameters(fope, shape)["num_inv_freq"]
    16
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
    """Raises ValueError, naming the knob, if engines cannot compute ``method``."""
    if not isinstance(method, FoPE):
        raise ValueError(f"{method}: expected FoPE; to_rope_parameters writes RoPE")
    method.check(shape)
    for knob, needed in {
        "series": True,
        "frequencies_from": "rope",
        "normalise": False,
        "scaling": (),
        "sigma_convention": "xavier",
    }.items():
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
            f"head_dim={shape.head_dim}: engines mix as many as there are, outputs='surviving'"
        )
    if not mixed.all():
        raise ValueError("drop_zero=False: engines mix no zero frequency")
    if method.zero_sine != 1 and outputs < shape.head_dim // 2:
        raise ValueError(
            f"zero_sine={method.zero_sine:g}: engines pad the sine of the "
            f"{shape.head_dim // 2 - outputs} pairs without a series with 1"
        )


def fope_coefficients_to_serving(
    method: FoPE, variables: PositionVariables, shape: ModelShape, prefix: str = PREFIX
) -> dict[str, np.ndarray]:
    """FoPE's ``cos_coef`` and ``sin_coef`` in the names and layout of serving engines.

    They are float32 ``[K, D, D]``, or ``[D, D]`` with ``heads="shared"``: rows are frequencies,
    fastest first, columns are pairs. Multimodal models use the prefix
    ``"model.language_model.rotary_emb."``. ValueError for a knob that the engines do not have, or
    layers that differ.
    """
    check_served(method, shape)
    stored = variables.layer_constants | variables.layer_params
    tensors = {}
    for name in COEFFICIENTS:
        layers = np.asarray(stored[name if name in stored else "cos_coef"], np.float32)
        if (layers != layers[0]).any():
            raise ValueError(f"{name} differs between layers: engines hold one for all layers")
        tensors[prefix + name] = layers[0]
    return tensors


def fope_coefficients_from_serving(
    method: FoPE, tensors: Mapping[str, Any], shape: ModelShape, prefix: str = PREFIX
) -> PositionVariables:
    """The inverse of ``fope_coefficients_to_serving``.

    ValueError if a tensor is missing or has the wrong shape, or if cosine and sine differ for a
    method that has one matrix for both.
    """
    check_served(method, shape)
    count = method.num_outputs(shape.head_dim)
    needed = (count, count) if method.heads == "shared" else (shape.num_kv_heads, count, count)
    coefficients = {}
    for name in COEFFICIENTS:
        if prefix + name not in tensors:
            same = [repr(other) for other in tensors if other.endswith(f".{name}")]
            hint = f"; did you mean {' or '.join(same)}? Then pass its prefix" if same else ""
            raise ValueError(f"{prefix + name!r} is missing{hint}")
        value = np.asarray(tensors[prefix + name], np.float32)
        if value.shape != needed:
            raise ValueError(f"{prefix + name!r} has shape {value.shape}: expected {needed}")
        coefficients[name] = jnp.broadcast_to(jnp.asarray(value), (shape.num_layers, *needed))
    cosine_alone = not method.separate_sine
    if cosine_alone and (coefficients["cos_coef"] != coefficients.pop("sin_coef")).any():
        raise ValueError(f"separate_sine=False: {prefix}cos_coef and {prefix}sin_coef differ")
    if method.learnable:
        return PositionVariables(layer_params=coefficients)
    return PositionVariables(layer_constants=coefficients)
