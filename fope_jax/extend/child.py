"""The experiment of a model that goes on: what follows from its parent, and what is stated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    Experiment,
    apply_overrides,
    build_experiment,
    experiment_to_dict,
    parse_knob,
    split_override,
)
from fope_jax.config.fields import convert, field_types, parse_value
from fope_jax.extend.methods import extend_position, target_classes
from fope_jax.model.transformer import HOW
from fope_jax.position import PositionEmbedding, from_spec, to_spec

OPTIMIZERS = ("keep", "reset-moments", "reset")
MEASURED = 5  # evaluations during the training, where train.evaluate_every says nothing


def child_experiment(
    parent: Experiment,
    step: int,
    method: str,
    length: int,
    optimizer: str = "reset-moments",
    overrides: Iterable[str] = (),
    *,
    imported: bool = False,
    config: ConfigDict | None = None,
) -> Experiment:
    """The experiment of a model that goes on from update ``step`` of ``parent``.

    What nothing states: the tokens of an update stay, so the batch has fewer rows; a tenth of the
    parent's updates (the paper's 1 B after 10 B tokens), a tenth of them warmup and no more than
    the parent's; the parent's peak rate, seed and settings; the contexts of its evaluation, as far
    as they are multiples of the new length and the method is defined there, scored before the first
    update, ``MEASURED`` times meanwhile and after the last; data from where the parent stopped.
    With ``optimizer`` "keep" the schedule goes on where the parent's stood.

    Args:
      parent: the parent's experiment.
      step: updates the parent had done.
      method: see ``position.extension.target_classes``.
      length: tokens of the new sequences.
      optimizer: one of ``OPTIMIZERS``.
      overrides: ``"--config.train.steps=100"``; ``position.KNOB`` is a knob of the scaling that
        the method adds, where it has it, else of the method.
      imported: the parent's updates were made elsewhere, so that its batch, steps and optimizer
        say nothing: ``train.batch_size`` and ``train.steps`` must be stated.
      config: a whole experiment, whose values count before what would follow from the parent. Its
        length and position embedding must be those that come out, and its model the parent's.

    Raises:
      ConfigError: an override that cannot be, a length that does not divide an update, a parent
        that has not come to its own length yet, or a ``config`` of another model, length or
        position embedding.
      ValueError: the method cannot follow the parent's, with the reason.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}")
    pairs = [split_override(override) for override in overrides]
    _check_overrides(pairs)
    file = config.to_dict() if config is not None else {}
    stated = {f"train.{key}" for key in file.get("train", {})} | {key for key, _ in pairs}
    old = parent.train
    tokens = old.batch_size * old.length
    if imported:
        _check_imported(stated, optimizer)
        tokens = length * _batch_size(file, dict(pairs))
    if length < 1 or tokens % length:
        raise ConfigError(
            f"length {length}: an update of the parent has {old.batch_size} x {old.length} = "
            f"{tokens} tokens, which are no whole rows of it"
        )
    if not 0 <= step <= old.steps:
        raise ConfigError(
            f"step {step} of the parent: it was trained for train.steps = {old.steps}; accepted: "
            f"a checkpoint of a step up to there"
        )
    trained = next(stage for stage in old.stages if step <= stage.stop)
    if trained.length != old.length:
        raise ConfigError(
            f"step {step} of the parent stands in its train.first_lengths, at {trained.length} "
            f"tokens; it can be extended once it has trained on its {old.length}, from step "
            f"{parent.train.stages[-1].start + 1} on"
        )
    knobs = _position_knobs(parent, method, pairs)
    position = extend_position(
        parent.position,
        method,
        from_length=old.length,
        length=length,
        head_dim=parent.model.shape.head_dim,
        knobs=knobs,
    )
    if config is not None:
        _check_file(build_experiment(config), position, method, length)

    rows, keeps = tokens // length, optimizer == "keep"
    values = experiment_to_dict(parent)
    values["name"] = f"{parent.name}+{method}-{length}"
    values["train"] |= {
        "steps": max(1, old.steps // 10),
        "batch_size": rows,
        "accumulate": math.gcd(old.accumulate, rows),
        "first_lengths": (),
        "schedule_start": old.schedule_start + step if keeps else 0,
        "data_start": old.data_start + step,
        "evaluate_every": None,
    }
    for key in ("lengths", "passkey_lengths"):
        contexts = [multiple * old.length for multiple in values["evaluate"][key]]
        defined = [
            n for n in contexts if n <= (position.limits.max_length or n) and n % length == 0
        ]
        values["evaluate"][key] = [n // length for n in defined] or ([1] if contexts else [])
    for section, own in file.items():
        values[section] = values[section] | own if isinstance(own, dict) else own
    values["position"], values["train"]["length"] = to_spec(position), length
    child = build_experiment(
        apply_overrides(
            ConfigDict(values),
            [f"{key}={text}" for key, text in pairs if not key.startswith("position.")],
        )
    )
    train = child.train
    if not keeps and "train.warmup_steps" not in stated:
        tenth = train.steps // 10
        warmup = tenth if imported else min(old.warmup_steps, tenth)
        train = dataclasses.replace(train, warmup_steps=warmup)
    scored = child.evaluate
    measurable = scored.lengths and scored.splits and scored.training_windows
    if "train.evaluate_every" not in stated and measurable:
        train = dataclasses.replace(train, evaluate_every=math.ceil(train.steps / MEASURED))
    child = dataclasses.replace(child, train=train)
    _check_same_model(parent, child)
    if train.batch_size * train.length != tokens:
        raise ConfigError(
            f"config.train.batch_size = {train.batch_size}: an update would have "
            f"{train.batch_size * train.length} tokens, the parent's has {tokens}; "
            f"{rows} rows of {length} tokens keep them"
        )
    return child


def _check_imported(stated: Container[str], optimizer: str) -> None:
    for key in ("train.batch_size", "train.steps"):
        if key not in stated:
            raise ConfigError(f"imported weights have no {key}; give --config.{key}")
    if optimizer == "keep":
        raise ConfigError("imported weights have no optimizer to keep; take reset")


def _batch_size(file: Mapping[str, Any], texts: Mapping[str, str]) -> int:
    if "train.batch_size" not in texts:
        return file["train"]["batch_size"]
    return convert("train.batch_size", parse_value(texts["train.batch_size"], int), int)


def _check_file(wanted: Experiment, position: PositionEmbedding, method: str, length: int) -> None:
    """Raises ConfigError where a configuration file describes another child."""
    if wanted.train.length != length:
        raise ConfigError(f"config.train.length = {wanted.train.length}, but --length is {length}")
    if wanted.position != position:
        flags = " ".join(
            f"--config.position.{knob}={value}"
            for knob, value in _knobs(wanted.position).items()
            if _knobs(position).get(knob) != value
        )
        raise ConfigError(
            f"config.position = {wanted.position}, but --method {method} at {length} tokens makes "
            f"{position} of the parent's. Knobs of an extension are given on the command line; "
            f"what differs: {flags}"
        )


def _knobs(position: PositionEmbedding) -> dict[str, Any]:
    """A method's knobs and those of the scaling that came last."""
    spec = to_spec(position)
    *_, last = [{}, *spec.pop("scaling", [])]
    return spec | last


def _check_overrides(pairs: Iterable[tuple[str, str]]) -> None:
    for key, text in pairs:
        for own, option in (("train.length", "--length"), ("position.method", "--method")):
            if key == own:
                raise ConfigError(f"config.{key} = {text}: an extension takes it from {option}")


def _position_knobs(
    parent: Experiment, method: str, pairs: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    cls, scaling = target_classes(parent.position, method)
    kinds = {"preset": str} | field_types(cls) | (field_types(scaling) if scaling else {})
    knobs = {}
    for key, text in pairs:
        section, _, knob = key.partition(".")
        if section == "position":
            knobs[knob] = from_spec(parse_knob(key, text, kinds.get(knob, Any)))
    return knobs


def _check_same_model(parent: Experiment, child: Experiment) -> None:
    before, after = dataclasses.asdict(parent.model), dataclasses.asdict(child.model)
    for key in before:
        if key not in HOW and before[key] != after[key]:
            raise ConfigError(
                f"config.model.{key}: {before[key]!r}, now {after[key]!r}; an extension keeps the "
                "model and changes its position embedding alone"
            )
