"""The experiment of an extended run: overrides, then values derived from its parent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    Experiment,
    apply_overrides,
    build_experiment,
    experiment_to_dict,
)
from fope_jax.config.fields import parse_value
from fope_jax.extend.frequencies import unwrapped
from fope_jax.extend.request import (
    check_drope,
    check_length,
    check_model,
    check_step,
    child_position,
    stated_overrides,
)
from fope_jax.position import PositionEmbedding, to_spec

OPTIMIZERS = ("keep", "reset-moments", "reset")
EVALUATIONS = 5  # during training, if train.evaluate_every is not stated


def child_experiment(
    parent: Experiment,
    step: int,
    method: str,
    length: int,
    optimizer: str = "reset-moments",
    overrides: Iterable[str] = (),
    *,
    is_imported: bool = False,
    config: ConfigDict | None = None,
    allow_shorter: bool = False,
    made_for: int | None = None,
) -> Experiment:
    """The experiment that continues from update ``step`` of ``parent``.

    Without an override, an update keeps its tokens; the steps are a tenth of the parent's (the
    paper: 1 B after 10 B tokens) with at most a tenth of warmup; the data continues where the
    parent stopped, and with ``optimizer`` "keep" the schedule too; evaluation uses those contexts
    of the parent that the new length divides. The rest is the parent's.

    Args:
      parent, step: the parent's experiment, and the updates it has done.
      method: see ``extend.methods.target_classes``.
      length: tokens of the new sequences.
      optimizer: one of ``OPTIMIZERS``.
      overrides: ``"--config.train.steps=100"``; for ``position.KNOB`` see ``extend_position``.
      is_imported: imported weights need ``train.batch_size`` and ``train.steps`` stated.
      config: values that replace the derived ones; must agree with length, method and model.
      allow_shorter, made_for: see ``extend_position``.

    Raises:
      ConfigError: an invalid override, a length that does not divide an update, a parent that is
        still in its ``first_lengths``, a ``config`` that does not agree, or DroPE at a longer
        length.
      ValueError: the method cannot continue from the parent's; the message says why.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}")
    check_length(length)
    texts = stated_overrides(overrides)
    file = config.to_dict() if config is not None else {}
    stated = {f"train.{key}" for key in file.get("train", {})} | texts.keys()

    # ------------------------------------------------------------------ the parent
    old, keeps_optimizer = parent.train, optimizer == "keep"
    tokens = old.batch_size * old.length
    if is_imported:
        missing = [key for key in ("train.batch_size", "train.steps") if key not in stated]
        if missing:
            options = " and ".join(f"--config.{key}" for key in missing)
            raise ConfigError(f"imported weights have no {' and '.join(missing)}; give {options}")
        if keeps_optimizer:
            raise ConfigError("imported weights have no optimizer to keep; take reset")
        text, key = texts.get("train.batch_size"), "train.batch_size"
        tokens = length * (parse_value(key, text, int) if text else file["train"]["batch_size"])
    if tokens % length:
        raise ConfigError(
            f"length {length}: an update of the parent has {old.batch_size} x {old.length} = "
            f"{tokens} tokens, which are no whole rows of it"
        )
    check_step(old, step)

    # ------------------------------------------------------------------ position embedding
    position = child_position(parent, method, length, texts, allow_shorter, made_for)
    check_drope(unwrapped(position), method, old.length, length)
    if config is not None:
        _check_file(build_experiment(config), position, method, length)

    # ------------------------------------------------------------------ derived values
    rows, values = tokens // length, experiment_to_dict(parent)
    values["name"] = f"{parent.name}+{method}-{length}"
    values["train"] |= {
        "steps": max(1, old.steps // 10),
        "batch_size": rows,
        "accumulate": math.gcd(old.accumulate, rows),
        "first_lengths": (),
        "decay_steps": None,
        "schedule_start": old.schedule_start + step if keeps_optimizer else 0,
        "data_start": old.data_start + step,
        "evaluate_every": None,
    }
    for key in ("lengths", "passkey_lengths"):
        contexts = [round(multiple * old.length) for multiple in values["evaluate"][key]]
        defined = [
            n for n in contexts if n <= (position.limits.max_length or n) and n % length == 0
        ]
        values["evaluate"][key] = [n // length for n in defined] or ([1] if contexts else [])
    for section, stated_values in file.items():
        is_section = isinstance(stated_values, dict)
        values[section] = values[section] | stated_values if is_section else stated_values
    values["position"], values["train"]["length"] = to_spec(position), length
    others = [f"{key}={text}" for key, text in texts.items() if not key.startswith("position.")]
    child = build_experiment(apply_overrides(ConfigDict(values), others))
    train, evaluate = child.train, child.evaluate
    if not keeps_optimizer and "train.warmup_steps" not in stated:
        tenth = train.steps // 10
        warmup = tenth if is_imported else min(old.warmup_steps, tenth)
        train = dataclasses.replace(train, warmup_steps=warmup)
    has_text = child.data.corpus != "none"
    can_evaluate = evaluate.lengths and evaluate.splits and evaluate.training_windows and has_text
    if "train.evaluate_every" not in stated and can_evaluate:
        train = dataclasses.replace(train, evaluate_every=math.ceil(train.steps / EVALUATIONS))
    check_model(parent, child)
    if train.batch_size * train.length != tokens:
        raise ConfigError(
            f"config.train.batch_size = {train.batch_size}: an update would have "
            f"{train.batch_size * train.length} tokens, the parent's has {tokens}; "
            f"{rows} rows of {length} tokens keep them"
        )
    return dataclasses.replace(child, train=train)


def _check_file(stated: Experiment, position: PositionEmbedding, method: str, length: int) -> None:
    """Raises ConfigError if a configuration file has another length or position embedding."""
    if stated.train.length != length:
        raise ConfigError(f"config.train.length = {stated.train.length}, but --length is {length}")
    if stated.position == position:
        return

    def knobs(method: PositionEmbedding) -> dict[str, Any]:
        """The knobs of a method and of its last scaling."""
        spec = to_spec(method)
        *_, last = [{}, *spec.pop("scaling", [])]
        return spec | last

    known = knobs(position)
    flags = " ".join(
        f"--config.position.{knob}={value}"
        for knob, value in knobs(stated.position).items()
        if known.get(knob) != value
    )
    raise ConfigError(
        f"config.position = {stated.position}, but --method {method} at {length} tokens makes "
        f"{position} of the parent's. Knobs of an extension are given on the command line; what "
        f"differs: {flags}"
    )
