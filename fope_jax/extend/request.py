"""What an extension asks for: its overrides, its position embedding, and what it may not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fope_jax.config import ConfigError, Experiment, TrainConfig, parse_knob, split_override
from fope_jax.config.experiment import knob_sources
from fope_jax.config.fields import field_types
from fope_jax.extend.frequencies import unwrapped
from fope_jax.extend.methods import (
    check_knobs,
    extend_position,
    is_own,
    named_module,
    target_classes,
)
from fope_jax.model.config import RUNTIME_FIELDS
from fope_jax.position import DroPE, PositionEmbedding, from_spec, import_module
from fope_jax.position.registry import spec_name

WINDOWS = ("windows",)  # fields of the model that say what attention sees; no array depends on them


def stated_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """Keys and texts of overrides; ConfigError for what options of the command state."""
    texts = dict(map(split_override, overrides))
    for key, option in (("train.length", "--length"), ("position.method", "--method")):
        if key in texts:
            raise ConfigError(f"config.{key} = {texts[key]}: an extension takes it from {option}")
    return texts


def check_length(length: int) -> None:
    """Raises ConfigError for a length of no tokens."""
    if length < 1:
        raise ConfigError(f"length {length}; accepted: 1 token or more")


def check_step(config: TrainConfig, step: int) -> None:
    """Raises ConfigError for a step that the parent has not done, or at another length."""
    if not 0 <= step <= config.steps:
        raise ConfigError(
            f"step {step} of the parent: it was trained for train.steps = {config.steps}; "
            "accepted: a checkpoint of a step up to there"
        )
    stage = next(stage for stage in config.stages if step <= stage.stop)
    if stage.length != config.length:
        raise ConfigError(
            f"step {step} of the parent stands in its train.first_lengths, at {stage.length} "
            f"tokens; it can be extended once it has trained on its {config.length}, from step "
            f"{config.stages[-1].start + 1} on"
        )


def check_model(parent: Experiment, child: Experiment) -> None:
    """Raises ConfigError where more of a model changes than how it runs and what it looks at."""
    before, after = dataclasses.asdict(parent.model), dataclasses.asdict(child.model)
    for key in before:
        if key not in (*RUNTIME_FIELDS, *WINDOWS) and before[key] != after[key]:
            raise ConfigError(
                f"config.model.{key}: {before[key]!r}, now {after[key]!r}; an extension keeps the "
                "model and changes its position embedding alone"
            )


def check_drope(position: PositionEmbedding, method: str, trained: int, length: int) -> None:
    """Raises ConfigError unless DroPE trains at the parent's length, without a temperature."""
    if not isinstance(position, DroPE):
        return
    if method == "drope" and length > trained:
        raise ConfigError(
            f"length {length}: DroPE trains at the {trained} tokens that the parent was trained "
            f"on, and reads longer texts without training; accepted: --length {trained}"
        )
    if position.length is not None:
        raise ConfigError(
            f"config.position.length = {position.length}: the temperature of an evaluation, with "
            "which DroPE is not trained; accepted: --no-train, or `fope evaluate RUN --as "
            f"drope:length={position.length}` afterwards"
        )


def child_position(
    parent: Experiment,
    method: str,
    length: int,
    texts: dict[str, str],
    allow_shorter: bool,
    made_for: int | None,
) -> PositionEmbedding:
    """The child's position embedding, with the knobs among the overrides.

    The module of ``MODULE:CLASS`` is imported, since the user names it.
    """
    if module := named_module(method):
        try:
            import_module(module)
        except ValueError as error:
            raise ConfigError(f"method {method!r}: {error}") from error
    prefix = "position."
    knobs = {
        key.removeprefix(prefix): text for key, text in texts.items() if key.startswith(prefix)
    }
    return extend_position(
        parent.position,
        method,
        from_length=parent.train.length,
        length=length,
        head_dim=parent.model.shape.head_dim,
        knobs=config_knobs(parent, method, length) | parse_knobs(parent.position, method, knobs),
        allow_shorter=allow_shorter,
        made_for=made_for,
        positions=parent.train.trained_positions,
    )


def config_knobs(parent: Experiment, method: str, length: int) -> dict[str, Any]:
    """The knobs that a new method of the user's own takes from the configuration, as in training.

    See `knob_source`; ``train.length`` is the new ``length``.
    """
    cls, _ = target_classes(parent.position, method)
    if not is_own(cls) or cls is type(unwrapped(parent.position)):
        return {}
    values = {f"model.{name}": value for name, value in dataclasses.asdict(parent.model).items()}
    values["train.length"] = length
    sources = knob_sources("method", spec_name(cls), None)
    return {knob: values[source] for knob, source in sources.items() if source in values}


def parse_knobs(parent: PositionEmbedding, method: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of knobs of ``method`` after ``parent``, by the types of its fields.

    >>> from fope_jax.position import RoPE
    >>> parse_knobs(RoPE(), "yarn", {"factor": "4", "truncate": "false"})
    {'factor': 4.0, 'truncate': False}
    """
    check_knobs(parent, method, texts)
    cls, scaling = target_classes(parent, method)
    kinds = {"preset": str} | field_types(cls) | (field_types(scaling) if scaling else {})
    return {
        knob: from_spec(parse_knob(f"position.{knob}", text, kinds.get(knob, Any)))
        for knob, text in texts.items()
    }
