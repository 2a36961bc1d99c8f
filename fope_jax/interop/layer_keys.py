"""RoPE, layers without it and windows: from the keys of config.json and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fope_jax.interop.families import (
    FOPE,
    FULL,
    LAYER_TYPES,
    MAX_POSITIONS,
    NO_ROPE,
    ONE_WINDOW,
    ROPE_BY_TYPE,
    SLIDING,
    SOME_WINDOWS,
    USE_WINDOW,
    WINDOW,
    Family,
)
from fope_jax.interop.layer_positions import LayerPosition, shortest_period
from fope_jax.interop.rope_parameters import (
    ORIGINAL,
    PARTIAL,
    THETA,
    canonical_type,
    flag,
    from_rope_parameters,
    integer,
    inverted_ramp_message,
    is_fope,
    to_rope_parameters,
)
from fope_jax.interop.serving import fope_from_rope_parameters, fope_to_rope_parameters
from fope_jax.position import FoPE, ModelShape, NoPE, PositionEmbedding, RoPE, name_of

# ---------------------------------------------------------------------------- from Hugging Face


def read_layers(
    values: Mapping[str, Any], family: Family, shape: ModelShape
) -> list[LayerPosition]:
    """The layers that a config.json describes; ``values`` as it is, with entries of None."""
    given = {key: value for key, value in values.items() if value is not None}
    count = shape.num_layers
    rotates = _read_rotating(given, count) if NO_ROPE in family.has else [True] * count
    windows = _read_windows(values, family, rotates)
    if ROPE_BY_TYPE in family.has:
        ropes = _read_ropes_by_type(given, family, shape, windows)
    else:
        stated = _stated_rope(given, family.theta)
        rope = _read_rope(stated, given, family.theta, shape)
        ropes = {FULL: rope, SLIDING: rope}
        if isinstance(rope, FoPE) and not all(rotates):
            raise ValueError(f"no_rope_layers={list(rotates)}: FoPE is in all layers or none")
        if isinstance(rope, FoPE) and any(windows):
            raise ValueError(f"{WINDOW}={max(filter(None, windows))}: no engine has it with FoPE")
    return [
        LayerPosition(ropes[_type_of(window)] if turns else NoPE(), window)
        for turns, window in zip(rotates, windows, strict=True)
    ]


def _type_of(window: int | None) -> str:
    return FULL if window is None else SLIDING


def _read_rotating(given: Mapping[str, Any], num_layers: int) -> list[int]:
    """For each layer 1 if it has RoPE and 0 if it has none, despite the name of the key."""
    layers = given.get("no_rope_layers")
    if layers is None:
        interval = integer("no_rope_layer_interval", given.get("no_rope_layer_interval", 4))
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval}: expected 1 or more")
        return [int((index + 1) % interval != 0) for index in range(num_layers)]
    is_list = isinstance(layers, list | tuple) and len(layers) == num_layers
    if not is_list or not all(layer in (0, 1) for layer in layers):
        raise ValueError(
            f"no_rope_layers={layers!r:.80}: expected a 0 or a 1 for each of {num_layers} layers"
        )
    return list(layers)


def _read_windows(
    values: Mapping[str, Any], family: Family, rotates: Sequence[int]
) -> list[int | None]:
    """The window of each layer; ``sliding_window`` of null is none, a missing one the default."""
    count = len(rotates)
    if ONE_WINDOW not in family.has:
        return [None] * count
    window = values.get(WINDOW, family.defaults.get(WINDOW))
    uses = values.get(USE_WINDOW)
    if USE_WINDOW in family.defaults:
        uses = flag(USE_WINDOW, family.defaults[USE_WINDOW] if uses is None else uses)
        window = window if uses else None
    elif uses is not None and flag(USE_WINDOW, uses) != (window is not None):
        raise ValueError(
            f"{USE_WINDOW}={uses} with {WINDOW}={window}: Hugging Face reads the latter alone here"
        )
    if window is not None and (window := integer(WINDOW, window)) < 1:
        raise ValueError(f"{WINDOW}={window}: expected 1 token or more")
    types = values.get(LAYER_TYPES)
    if types is None:
        types = _default_types(values, family, rotates, window)
    if not isinstance(types, list | tuple) or len(types) != count:
        raise ValueError(f"{LAYER_TYPES}={types!r:.80}: expected a list with {count} entries")
    if other := sorted({str(entry) for entry in types} - {FULL, SLIDING}):
        raise ValueError(f"{LAYER_TYPES} holds {', '.join(other)}: known are {FULL}, {SLIDING}")
    if window is None and SLIDING in types:
        reason = f"{USE_WINDOW} is False" if uses is False else f"{WINDOW} is null"
        raise ValueError(f"{LAYER_TYPES} holds {SLIDING}, but {reason}: change one of them")
    return [window if entry == SLIDING else None for entry in types]


def _default_types(
    values: Mapping[str, Any], family: Family, rotates: Sequence[int], window: int | None
) -> list[str]:
    """``layer_types`` as transformers fills them in."""
    count = len(rotates)
    if ROPE_BY_TYPE in family.has:  # OLMo 3, with or without a width
        return [FULL if (index + 1) % 4 == 0 else SLIDING for index in range(count)]
    if window is None:
        return [FULL] * count
    if NO_ROPE in family.has:  # SmolLM 3
        return [FULL if turns else SLIDING for turns in rotates]
    first = family.defaults.get("max_window_layers", 0)
    if first and values.get("max_window_layers") is not None:  # Qwen
        first = integer("max_window_layers", values["max_window_layers"])
    return [FULL if index < first else SLIDING for index in range(count)]


def _read_ropes_by_type(
    given: Mapping[str, Any], family: Family, shape: ModelShape, windows: Sequence[int | None]
) -> dict[str, PositionEmbedding]:
    """The RoPE of layers with and without a window, from ``rope_parameters`` nested by type.

    The older ``rope_scaling`` is that of full layers, and so is a base outside: transformers
    gives it to no layer with a window.
    """
    nested, scaling = (given.get(name, {}) for name in ("rope_parameters", "rope_scaling"))
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r:.80}: expected a mapping of its keys")
    if nested and scaling:
        raise ValueError(f"rope_parameters={nested}, rope_scaling={scaling}: leave one out")
    entries = {FULL: scaling} | {name: x for name, x in nested.items() if x is not None}
    if other := sorted(entries.keys() - {FULL, SLIDING}):
        raise ValueError(
            f"rope_parameters has {', '.join(other)}: here its keys are {FULL} and {SLIDING}, each "
            "with a mapping"
        )
    if ORIGINAL in given:
        raise ValueError(
            f"{ORIGINAL}={given[ORIGINAL]}: Hugging Face does not read it here; state it in "
            "rope_parameters"
        )
    others, outside = {key: x for key, x in given.items() if key != THETA}, given.get(THETA)
    ropes = {}
    for name in sorted({_type_of(window) for window in windows}):
        entry = entries.get(name, {})
        if not isinstance(entry, Mapping):
            raise ValueError(f"rope_parameters.{name}={entry!r:.80}: expected a mapping")
        entry = {key: value for key, value in entry.items() if value is not None}
        if is_fope(entry):
            raise ValueError(f"rope_parameters.{name}={entry}: FoPE is in all layers or none")
        if name == SLIDING and THETA not in entry and outside not in (None, family.theta):
            raise ValueError(
                f"{THETA}={outside}: transformers gives it to full layers and {family.theta:g} to "
                f"those with a window; state it in rope_parameters, in {FULL} and in {SLIDING}"
            )
        base = family.theta if outside is None else outside
        try:
            ropes[name] = _read_rope(entry, others, base, shape)
        except ValueError as error:
            raise ValueError(f"rope_parameters.{name}: {error}") from error
    return ropes


def _stated_rope(given: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """``rope_parameters`` or the older ``rope_scaling``, without entries of None."""
    stated = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = given.get(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r:.80}: expected a mapping of its keys")
        if entries := {key: x for key, x in value.items() if x is not None}:
            stated[name] = entries

    def canonical(entries: dict[str, Any]) -> dict[str, Any]:
        rope_type = canonical_type(entries.get("rope_type", entries.get("type", "default")))
        others = {key: x for key, x in entries.items() if key != "type"}
        return {THETA: given.get(THETA, theta)} | others | {"rope_type": rope_type}

    first, *second = stated.values() or [{}]
    if second and canonical(first) != canonical(second[0]):
        both = ", ".join(f"{name}={entries}" for name, entries in stated.items())
        raise ValueError(f"{both}: leave one out")
    return first


def _read_rope(
    parameters: Mapping[str, Any], given: Mapping[str, Any], theta: float, shape: ModelShape
) -> PositionEmbedding:
    """One method; the meaning of ``max_position_embeddings`` depends on its type."""
    parameters = dict(parameters)
    if not {"rope_type", "type"} & parameters.keys():
        parameters["rope_type"] = "default"
    rope_type = canonical_type(parameters.get("rope_type", parameters.get("type")))
    partial = parameters.get(PARTIAL, given.get(PARTIAL, 1))
    if partial != 1 and rope_type != "proportional":
        raise ValueError(f"{PARTIAL}={partial}: these models rotate the whole head, 1")
    base = given.get(THETA, None if THETA in parameters else theta)
    length = integer(MAX_POSITIONS, given[MAX_POSITIONS])
    if is_fope(parameters):
        count = parameters.get("num_inv_freq", parameters.get("fope_num_inv_freq"))
        return fope_from_rope_parameters(
            parameters,
            head_dim=shape.head_dim,
            training_length=length if count is None else None,
            rope_theta=base,
        )
    original, extended = None, None
    if rope_type == "dynamic":
        if parameters.get(ORIGINAL, length) != length:
            raise ValueError(
                f"{ORIGINAL!r} of rope_type='dynamic' is {parameters[ORIGINAL]!r:.80}, "
                f"{MAX_POSITIONS!r} is {length}: Hugging Face takes the latter for the trained "
                "length; give it the trained length, or leave the former out"
            )
        original = length
    elif rope_type in ("yarn", "longrope", "llama3"):
        original = given.get(ORIGINAL, None if ORIGINAL in parameters else length)
        extended = None if "factor" in parameters or rope_type == "llama3" else length
    method = from_rope_parameters(
        parameters,
        head_dim=shape.head_dim,
        original_length=original,
        extended_length=extended,
        rope_theta=base,
        partial_rotary_factor=None if PARTIAL in parameters else given.get(PARTIAL),
    )
    if difference := inverted_ramp_message(method, shape.head_dim):
        raise ValueError(f"{difference}: change these keys so that the two agree")
    return method


# ---------------------------------------------------------------------------- to Hugging Face


def layer_needs(layers: Sequence[LayerPosition], shape: ModelShape) -> set[str]:
    """What a family must have to hold these layers; ValueError if none can."""
    windows = {layer.window for layer in layers}
    widths = sorted(window for window in windows if window is not None)
    if len(widths) > 1:
        raise ValueError(
            f"windows of {', '.join(map(str, widths))} tokens: models of Hugging Face have one "
            "width"
        )
    ropes = _ropes_by_type(layers)
    parameters = {name: _to_parameters(method, shape) for name, method in ropes.items()}
    needs = set()
    if any(type(layer.method) is NoPE for layer in layers):
        needs.add(NO_ROPE)
    if widths:
        needs.add(SOME_WINDOWS if None in windows else ONE_WINDOW)
    if len(ropes) > 1 and parameters[FULL] != parameters[SLIDING]:
        needs.add(ROPE_BY_TYPE)
    if any(type(method) is FoPE for method in ropes.values()):
        if needs:
            raise ValueError(
                f"position.method='fope' with {' and '.join(sorted(needs))}: engines have FoPE in "
                "all layers, with full attention"
            )
        needs.add(FOPE)
    return needs


def layer_keys(
    family: Family, layers: Sequence[LayerPosition], shape: ModelShape
) -> dict[str, Any]:
    """The keys of config.json for layers whose ``layer_needs`` the family has."""
    ropes = _ropes_by_type(layers)
    parameters = {name: _to_parameters(method, shape) for name, method in ropes.items()}
    first = next(iter(parameters.values()))
    keys: dict[str, Any] = {"rope_parameters": first}
    if ROPE_BY_TYPE in family.has:
        keys["rope_parameters"] = {name: parameters.get(name, first) for name in (FULL, SLIDING)}
    if NO_ROPE in family.has:
        keys["no_rope_layers"] = [int(type(layer.method) is not NoPE) for layer in layers]
    window = next((layer.window for layer in layers if layer.window is not None), None)
    if ONE_WINDOW not in family.has or window is None and USE_WINDOW in family.defaults:
        return keys
    keys[WINDOW] = window
    if USE_WINDOW in family.defaults:
        keys[USE_WINDOW] = True
    if SOME_WINDOWS in family.has:
        keys[LAYER_TYPES] = [_type_of(layer.window) for layer in layers]
    return keys


def _ropes_by_type(layers: Sequence[LayerPosition]) -> dict[str, PositionEmbedding]:
    """The rotation of full layers and of those with a window, of the types that there are."""
    ropes: dict[str, PositionEmbedding] = {}
    for method, window in layers:
        if type(method) is NoPE:
            continue
        if ropes.setdefault(_type_of(window), method) != method:
            raise ValueError(
                f"position.methods={shortest_period([x.method for x in layers])}: Hugging Face "
                "knows layers with one RoPE, with one for full layers and one for those with a "
                "window, and layers without position"
            )
    return ropes or {FULL: RoPE()}


def _to_parameters(method: PositionEmbedding, shape: ModelShape) -> dict[str, Any]:
    if type(method) is FoPE:
        parameters = fope_to_rope_parameters(method, shape)
    elif type(method) is RoPE:
        parameters = to_rope_parameters(method)
    else:
        raise ValueError(
            f"position.method={name_of(method)!r}: models of Hugging Face have no form of it; they "
            "have RoPE, RoPE with layers of NoPE, and FoPE as serving engines compute it"
        )
    if parameters.get(PARTIAL, 1) != 1 and parameters["rope_type"] != "proportional":
        raise ValueError(f"{PARTIAL}={parameters[PARTIAL]}: these models rotate the whole head, 1")
    return parameters
