"""A trained model goes on at a longer length, with another position embedding: `fope extend`.

The new run begins with a checkpoint of step 0: the parent's weights, and position arrays and
optimizer state carried over. From there on it is a run like any other, and needs no parent.
``lineage.json`` beside its config.json says where it comes from and what was changed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from fope_jax.checkpoint import CheckpointStore
from fope_jax.config import (
    ConfigError,
    Experiment,
    build_experiment,
    experiment_to_dict,
    overridden,
    position_value,
    split_override,
)
from fope_jax.data.cache import TokenCache, open_cache
from fope_jax.data.loader import Loader
from fope_jax.evaluate.identity import check_fingerprint, position_identity
from fope_jax.evaluate.run import find_step, read_experiment
from fope_jax.fields import checked, field_types, parse
from fope_jax.files import as_path, resolved, write_json
from fope_jax.interop.families import LENGTH
from fope_jax.lock import writing
from fope_jax.model.sharding import place
from fope_jax.model.transformer import HOW, position_variables
from fope_jax.position import PositionVariables, from_spec, to_spec
from fope_jax.position.extension import extended, frequency_changes, target_parts
from fope_jax.position.transplant import Transplant, carry_variables
from fope_jax.processes import is_first, on_host, wait_for_all
from fope_jax.train.loop import put, share_positions, train
from fope_jax.train.saves import check_not_lost
from fope_jax.train.state import StatePlan, draw_position, plan_state
from fope_jax.train.step import TrainState, batch_sums
from fope_jax.train.workdir import (
    CHECKPOINTS,
    CONFIG,
    IMPORTED,
    KEPT,
    RUN,
    open_workdir,
    run_and_step,
)

log = logging.getLogger(__name__)

LINEAGE = "lineage.json"
OPTIMIZERS = ("keep", "reset-moments", "reset")
WARN_ABOVE = 1.2  # loss at the start over the parent's
CHECKED_UPDATES = 4  # the start is measured on the tokens of so many updates


# ---------------------------------------------------------------------------- the parent


class Parent(NamedTuple):
    """A trained model to go on from.

    Attributes:
      source: where it is, for people and for lineage.json.
      experiment: that it was trained in; of imported weights ``train.length`` is theirs.
      step: updates done.
      imported: whether its weights come from elsewhere, with no optimizer and no data of ours.
      load: plan of its state, whether the optimizer is wanted -> its arrays.
    """

    source: str
    experiment: Experiment
    step: int
    imported: bool
    load: Callable[[StatePlan, bool], ParentArrays]


class ParentArrays(NamedTuple):
    """What a parent's checkpoint holds.

    Attributes:
      items: ``params``, ``constants`` and, where asked for, ``optimizer``.
      metadata: position and data fingerprints; data None of imported weights.
    """

    items: dict[str, Any]
    metadata: dict[str, Any]


def open_parent(source: str | Path, step: int | None = None) -> Parent:
    """Finds a parent; no array is read before ``load``. Whatever else can be one is found here.

    Args:
      source: a run, as ``runs/a``, or one of its checkpoints, as ``runs/a/500``.
      step: which checkpoint where ``source`` names none; None takes the newest valid one.

    Raises:
      FileNotFoundError: there is no run, or it has no valid checkpoint.
      CheckpointError: from ``load``: the step named is missing or damaged.
    """
    run, named = run_and_step(source)
    step = step if named is None else named
    experiment = read_experiment(run)
    if step is None:
        store = CheckpointStore(run / CHECKPOINTS)
        step = find_step(run, store, None)
        store.close()
    found = step

    def load(plan: StatePlan, with_optimizer: bool) -> ParentArrays:
        store = CheckpointStore(run / CHECKPOINTS)
        where, shape = f"{run}, step {found}", experiment.model.shape
        items = {"params": plan.state.params, "constants": plan.constants}
        if with_optimizer:
            items["optimizer"] = plan.state.optimizer
        try:
            metadata = store.metadata(found)
            check_fingerprint(metadata, experiment.position, shape, None, where)
            arrays = store.restore(found, items)
        finally:
            store.close()
        check_fingerprint(metadata, experiment.position, shape, arrays["constants"], where)
        return ParentArrays(arrays, metadata)

    info = run / RUN
    facts = json.loads(info.read_text()) if info.is_file() else {}
    if IMPORTED in facts:  # there train.length is what evaluation counts in
        trained = facts[KEPT].get(LENGTH, experiment.train.length)
        train_config = dataclasses.replace(experiment.train, length=trained)
        experiment = dataclasses.replace(experiment, train=train_config)
    return Parent(str(resolved(run)), experiment, step, IMPORTED in facts, load)


# ---------------------------------------------------------------------------- the experiment


def child_experiment(
    parent: Experiment,
    step: int,
    method: str,
    length: int,
    optimizer: str = "reset-moments",
    overrides: Iterable[str] = (),
    *,
    imported: bool = False,
) -> Experiment:
    """The experiment of a model that goes on from update ``step`` of ``parent``.

    What no override states: the tokens of an update stay, so the batch has fewer rows; a tenth of
    the parent's updates (the paper's 1 B after 10 B tokens), a tenth of them warmup and no more
    than the parent's; the parent's peak rate, seed and settings; the contexts of its evaluation, as
    far as they are multiples of the new length and the method is defined there; data from where
    the parent stopped. With ``optimizer`` "keep" the schedule goes on where the parent's stood.

    Args:
      parent: the parent's experiment.
      step: updates the parent had done.
      method: see ``position.extension.target_parts``.
      length: tokens of the new sequences.
      optimizer: one of ``OPTIMIZERS``.
      overrides: ``"--config.train.steps=100"``; ``position.KNOB`` is a knob of the scaling that
        the method adds, where it has it, else of the method.
      imported: the parent's updates were made elsewhere, so that its batch, steps and optimizer
        say nothing: overrides give ``train.batch_size`` and ``train.steps``.

    Raises:
      ConfigError: an override that cannot be, a length that does not divide an update, or a parent
        that has not come to its own length yet.
      ValueError: the method cannot follow the parent's, with the reason.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}")
    pairs = [split_override(override) for override in overrides]
    old = parent.train
    tokens = old.batch_size * old.length
    if imported:
        given = dict(pairs)
        missing = [key for key in ("train.batch_size", "train.steps") if key not in given]
        if missing or optimizer == "keep":
            raise ConfigError(
                f"imported weights have no {missing[0] if missing else 'optimizer to keep'}; "
                + (f"give --config.{missing[0]}" if missing else "take reset")
            )
        tokens = length * checked("train.batch_size", parse(given["train.batch_size"], int), int)
    if length < 1 or tokens % length:
        raise ConfigError(
            f"length {length}: an update of the parent has {old.batch_size} x {old.length} = "
            f"{tokens} tokens, which are no whole rows of it"
        )
    trained = next(stage for stage in parent.train.stages if step <= stage.stop)
    if trained.length != old.length:
        raise ConfigError(
            f"step {step} of the parent stands in its train.first_lengths, at {trained.length} "
            f"tokens; it can be extended once it has trained on its {old.length}, from step "
            f"{parent.train.stages[-1].start + 1} on"
        )
    _check_overrides(pairs)
    knobs = _position_knobs(parent, method, pairs)
    position = extended(
        parent.position, method, from_length=old.length, length=length,
        head_dim=parent.model.shape.head_dim, knobs=knobs,
    )  # fmt: skip

    rows, keeps = tokens // length, optimizer == "keep"
    values = experiment_to_dict(parent)
    values["position"] = to_spec(position)
    values["name"] = f"{parent.name}+{method}-{length}"
    values["train"] |= {
        "steps": max(1, old.steps // 10),
        "batch_size": rows,
        "length": length,
        "accumulate": math.gcd(old.accumulate, rows),
        "first_lengths": (),
        "schedule_start": old.schedule_start + step if keeps else 0,
        "data_start": old.data_start + step,
    }
    for key in ("lengths", "passkey_lengths"):
        contexts = [multiple * old.length for multiple in values["evaluate"][key]]
        defined = [n for n in contexts if n <= (position.max_length() or n) and n % length == 0]
        values["evaluate"][key] = [n // length for n in defined] or ([1] if contexts else [])
    config = overridden(
        ConfigDict(values),
        [f"{key}={text}" for key, text in pairs if not key.startswith("position.")],
    )
    if not keeps and "train.warmup_steps" not in dict(pairs):
        tenth = config.train.steps // 10
        config.train.warmup_steps = tenth if imported else min(old.warmup_steps, tenth)
    child = build_experiment(config)
    _check_same_model(parent, child)
    if child.train.batch_size * child.train.length != tokens:
        raise ConfigError(
            f"config.train.batch_size = {child.train.batch_size}: an update would have "
            f"{child.train.batch_size * child.train.length} tokens, the parent's has {tokens}; "
            f"{rows} rows of {length} tokens keep them"
        )
    return child


def _check_overrides(pairs: Iterable[tuple[str, str]]) -> None:
    for key, text in pairs:
        for own, option in (("train.length", "--length"), ("position.method", "--method")):
            if key == own:
                raise ConfigError(f"config.{key} = {text}: an extension takes it from {option}")


def _position_knobs(
    parent: Experiment, method: str, pairs: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    cls, scaling = target_parts(parent.position, method)
    kinds = {"preset": str} | field_types(cls) | (field_types(scaling) if scaling else {})
    knobs = {}
    for key, text in pairs:
        section, _, knob = key.partition(".")
        if section == "position":
            knobs[knob] = from_spec(position_value(key, text, kinds.get(knob, Any)))
    return knobs


def _check_same_model(parent: Experiment, child: Experiment) -> None:
    before, after = dataclasses.asdict(parent.model), dataclasses.asdict(child.model)
    for key in before:
        if key not in HOW and before[key] != after[key]:
            raise ConfigError(
                f"config.model.{key}: {before[key]!r}, now {after[key]!r}; an extension keeps the "
                "model and changes its position embedding alone"
            )


# ---------------------------------------------------------------------------- the arrays


def carry_state(
    parent: Mapping[str, Any], moved: Transplant, plan: StatePlan, optimizer: str
) -> tuple[TrainState, Any]:
    """State and position constants of the child before its first update.

    Args:
      parent: its ``params``, ``constants`` and, for "keep", ``optimizer``.
      moved: the position arrays.
      plan: of the child's state.
      optimizer: "keep" takes the moments and Adam's count, for a position array only where it is
        the parent's; the count of the schedule begins anew, and ``train.schedule_start`` says where
        the schedule stands. "reset-moments" and "reset" begin with moments and counts of zero,
        which with AdamW is the same; neither reads the parent's.
    """
    own = moved.variables
    params = _with_position(parent["params"], own.model_params, own.layer_params, plan.state.params)
    constants = _with_position({}, own.model_constants, own.layer_constants, plan.constants)
    shardings = jax.tree.map(lambda x: x.sharding, plan.state.optimizer)
    state = jax.jit(plan.optimizer.init, out_shardings=shardings)(params)
    if optimizer == "keep":
        state = _kept_optimizer(state, parent["optimizer"], moved.carried)
    return TrainState(params, state), constants


_POSITION = ("position_model", "position_layers")


def _with_position(
    tree: Mapping[str, Any], model: Mapping[str, Any], layers: Mapping[str, Any], wanted: Any
) -> dict[str, Any]:
    """``tree`` with the position arrays of the child, in the places of ``wanted``."""
    result = {name: part for name, part in tree.items() if name not in _POSITION}
    for name, arrays in zip(_POSITION, (model, layers), strict=True):
        if name in wanted:
            result[name] = {
                key: place(np.asarray(arrays[key]), leaf.sharding)
                for key, leaf in wanted[name].items()
            }
    return result


def _kept_optimizer(fresh: Any, old: Any, carried: frozenset[str]) -> Any:
    """``fresh`` with the leaves of ``old``, but for schedules and arrays that are not carried."""

    def part(new: Any, known: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        leaves = dict(jax.tree_util.tree_flatten_with_path(known)[0])

        def choose(path: tuple[Any, ...], leaf: Any) -> Any:
            keys = [getattr(entry, "key", None) for entry in path]
            if any(name in _POSITION for name in keys) and keys[-1] not in carried:
                return leaf
            return leaves[path]

        return jax.tree_util.tree_map_with_path(choose, new)

    return tuple(part(new, known) for new, known in zip(fresh, old, strict=True))


# ---------------------------------------------------------------------------- before the start


def stream_loss(
    experiment: Experiment,
    plan: StatePlan,
    params: Any,
    constants: Any,
    cache: TokenCache,
    tokens: int,
) -> float:
    """The loss of the first ``tokens`` tokens of a split, in windows of the training length.

    At every length the same targets are scored, each with what stands before it in its window.

    Args:
      experiment: gives length, rows of a forward pass and packing.
      plan: of its state, ``plan_state(experiment)``.
      params, constants: arrays of the model.
      cache: the split.
      tokens: a multiple of the length, or all that there are.

    Returns:
      Nats a token.
    """
    config, packing = experiment.train, experiment.data.packing
    rows, count = config.batch_size // config.accumulate, math.ceil(tokens / config.length)
    loader = Loader(cache, length=config.length, batch_size=rows, seed=0, packing=packing)
    score = jax.jit(lambda *arrays: batch_sums(plan.graphdef, *arrays))
    nats, scored = 0.0, 0.0
    with jax.set_mesh(plan.mesh):
        for start in range(0, count, rows):
            numbers = np.arange(start, start + rows)
            batch = loader.windows(np.minimum(numbers, count - 1))
            inside = (numbers < count).astype(np.float32)[:, None]
            batch = batch._replace(weights=batch.weights * inside)
            sums = score(params, constants, put(share_positions(batch, packing), plan.mesh))
            nats, scored = nats + float(sums.nats), scored + float(sums.tokens)
    return nats / scored


def measure_start(
    parent: Experiment,
    arrays: Mapping[str, Any],
    child: Experiment,
    state: TrainState,
    constants: Any,
    warn_above: float,
) -> dict[str, Any]:
    """What the change alone costs: validation loss of parent and child, before any update.

    Warns where the child's loss at its length is more than ``warn_above`` times the parent's at its
    own.

    Returns:
      Losses in nats a token, their ratio, and the warning or None.
    """
    cache = open_cache(child.data, "validation")
    update = child.train.batch_size * child.train.length
    tokens = update * min(CHECKED_UPDATES, cache.num_tokens // update) or cache.num_tokens

    def loss(experiment: Experiment, params: Any, constants: Any) -> float:
        return stream_loss(experiment, plan_state(experiment), params, constants, cache, tokens)

    trained = arrays["params"], arrays["constants"]
    before, after = loss(parent, *trained), loss(child, state.params, constants)
    limit, longer = parent.position.max_length(), None
    if limit is None or limit >= child.train.length:
        longer = loss(dataclasses.replace(parent, train=child.train), *trained)
    result = {
        "tokens": tokens,
        "parent": before,
        "parent_at_new_length": longer,
        "child": after,
        "ratio": after / before,
        "warn_above": warn_above,
        "warning": None,
    }
    log.info(
        "before the first update: loss %.4f with the parent's position embedding at %d tokens, "
        "%s at %d, %.4f with the new one (%d validation tokens)",
        before, parent.train.length, "undefined" if longer is None else f"{longer:.4f}",
        child.train.length, after, tokens,
    )  # fmt: skip
    if not after <= warn_above * before:  # also where it is no number
        result["warning"] = (
            f"the child starts at a loss of {after:.4f}, {after / before:.2f} times the parent's "
            f"{before:.4f}, more than {warn_above:g} times: the change breaks more than it keeps, "
            "and much of the training will be spent on mending it"
        )
        log.warning("WARNING: %s", result["warning"])
    return result


# ---------------------------------------------------------------------------- lineage


def _data_changes(parent: Experiment, child: Experiment, cache: TokenCache) -> dict[str, Any]:
    """How the stream of tokens is cut for the child, and where in it the child begins."""
    old, new = parent.train, child.train
    windows = [math.ceil(cache.num_tokens / config.length) for config in (old, new)]
    text = (
        f"the documents in their order, {cache.num_tokens} tokens, in {windows[1]} windows of "
        f"{new.length} in place of {windows[0]} of {old.length}; {new.batch_size} rows an update "
        f"in place of {old.batch_size}, {new.batch_size * new.length} tokens as before; begins at "
        f"batch {new.data_start} of its shuffled windows"
    )
    if new.length != old.length:
        text += ", another order than the parent's, so that some were seen by it and some not"
    return {
        "text": text,
        "tokens": cache.num_tokens,
        "windows": windows,
        "lengths": [old.length, new.length],
        "rows": [old.batch_size, new.batch_size],
        "tokens_an_update": new.batch_size * new.length,
        "first_batch": new.data_start,
    }


def read_lineage(workdir: str | Path) -> dict[str, Any] | None:
    """lineage.json of a run; None of a run that was trained from the beginning."""
    path = as_path(workdir) / LINEAGE
    return json.loads(path.read_text()) if path.is_file() else None


def _check_request(workdir: Path, lineage: dict[str, Any] | None, request: dict[str, Any]) -> None:
    """Raises ConfigError where a workdir holds another run than the one asked for."""
    if lineage is None:
        if (workdir / CHECKPOINTS).is_dir() and (workdir / CONFIG).is_file():
            raise ConfigError(
                f"workdir {workdir} holds a run that is no extension (it has no {LINEAGE}); use "
                "another --workdir"
            )
        return
    for key, value in request.items():
        if lineage["request"][key] != value:
            raise ConfigError(
                f"workdir {workdir} holds an extension with {key} = {lineage['request'][key]}, now "
                f"{value}; use another --workdir"
            )


# ---------------------------------------------------------------------------- the verb


def extend(
    source: str | Path,
    method: str,
    length: int,
    workdir: str | Path,
    *,
    optimizer: str = "reset-moments",
    match: str = "frequency",
    warn_above: float = WARN_ABOVE,
    overrides: Iterable[str] = (),
) -> None:
    """Makes a run that goes on from another one, and trains it to its last step.

    Called again after an interruption it goes on as ``train`` does, to the same bits.

    Args:
      source: the parent, ``runs/a`` or ``runs/a/STEP``.
      method: the position embedding to go on with, see ``position.extension.target_parts``.
      length: tokens of the new sequences.
      workdir: of the new run.
      optimizer: what becomes of the optimizer's state, see ``carry_state``.
      match: how FoPE's coefficients find their frequency, see ``position.transplant``.
      warn_above: see ``measure_start``.
      overrides: see ``child_experiment``.

    Raises:
      ConfigError: see ``child_experiment``; or the workdir holds another run.
      ValueError: the method cannot follow the parent's.
      CheckpointError, FileNotFoundError: the parent, see ``open_parent``; and as ``train``.
    """
    workdir, overrides = as_path(workdir), list(overrides)
    lineage = read_lineage(workdir)
    parent = open_parent(source, lineage["request"]["step"] if lineage else None)
    if str(resolved(workdir)) == parent.source:
        raise ConfigError(f"workdir {workdir} is the parent itself; use another --workdir")
    request = {
        "parent": parent.source, "step": parent.step, "method": method, "length": length,
        "optimizer": optimizer, "match": match,
    }  # fmt: skip
    child = child_experiment(parent.experiment, parent.step, method, length, optimizer, overrides)
    _check_request(workdir, lineage, request)
    with writing(workdir, "extend"):
        store = CheckpointStore(workdir / CHECKPOINTS, keep=child.train.keep)
        try:
            if store.latest_valid_step(set_aside=True) is None:
                check_not_lost(workdir, None)
                _begin(parent, child, workdir, store, request, warn_above)
        finally:
            store.close()
    train(child, workdir)


def _begin(
    parent: Parent,
    child: Experiment,
    workdir: Path,
    store: CheckpointStore,
    request: dict[str, Any],
    warn_above: float,
) -> None:
    """Writes config.json, lineage.json and the checkpoint of step 0."""
    # The parent's model, computed as the child is and on its devices.
    computed = {name: getattr(child.model, name) for name in HOW}
    before = dataclasses.replace(
        parent.experiment, mesh=child.mesh,
        model=dataclasses.replace(parent.experiment.model, **computed),
    )  # fmt: skip
    cache, plan = open_cache(child.data, "train"), plan_state(child)
    arrays, metadata = parent.load(plan_state(before), request["optimizer"] == "keep")
    _check_data(parent.experiment, metadata["data"], child, cache)
    if is_first():
        open_workdir(workdir, child)
    wait_for_all("workdir")
    trained = jax.tree.map(on_host, position_variables(arrays["params"], arrays["constants"]))
    moved = _move(before, trained, child, request["match"])
    state, constants = carry_state(arrays, moved, plan, request["optimizer"])

    fingerprint, identity = position_identity(child.position, child.model.shape, constants)
    identity["data"] = cache.fingerprint
    head_dim = child.model.shape.head_dim
    frequencies = frequency_changes(before.position, child.position, head_dim)
    data = _data_changes(before, child, cache)
    log.info("%s, step %d, goes on as %s", parent.source, parent.step, child.name)
    if frequencies is not None:
        log.info("frequencies: %s", frequencies.text)
    if moved.text:
        log.info("position arrays: %s", moved.text)
    log.info("data: %s", data["text"])
    start = measure_start(before, arrays, child, state, constants, warn_above)
    update = before.train.batch_size * before.train.length
    lineage = {
        "request": request,
        "parent": {
            "run": parent.source,
            "step": parent.step,
            "name": before.name,
            "length": before.train.length,
            "tokens_seen": (before.train.data_start + parent.step) * update,
            "position": {
                "hash": metadata["position"],
                "summary": metadata.get("position_summary"),
            },
        },
        "child": {
            "name": child.name,
            "length": child.train.length,
            "position": {"hash": fingerprint.hash, "summary": fingerprint.summary},
        },
        "frequencies": frequencies and {"text": frequencies.text, **frequencies._asdict()},
        "arrays": moved.text,
        "data": data,
        "start": start,
    }
    if is_first():
        write_json(workdir / LINEAGE, lineage)
    items = {"params": state.params, "constants": constants, "optimizer": state.optimizer}
    store.save(0, items, identity)


def _move(
    parent: Experiment, trained: PositionVariables, child: Experiment, match: str
) -> Transplant:
    return carry_variables(
        parent.position, trained, child.position, draw_position(child),
        child.model.shape.head_dim, from_length=parent.train.length, match=match,
    )  # fmt: skip


def _check_data(parent: Experiment, fingerprint: str, child: Experiment, cache: TokenCache) -> None:
    """Raises ConfigError where tokens would mean something else to the model."""
    if fingerprint is None:  # imported: there need be no cache of its own configuration
        if child.data.tokenizer != parent.data.tokenizer:
            raise ConfigError(
                f"config.data.tokenizer = {child.data.tokenizer!r}: the parent's is "
                f"{parent.data.tokenizer!r}, and its model reads tokens of no other"
            )
        return
    same = dataclasses.replace(parent.data, cache_dir=child.data.cache_dir) == child.data
    if same and cache.fingerprint != fingerprint:
        raise ConfigError(
            f"the parent was trained on a token cache with fingerprint {fingerprint}, but the one "
            f"in {child.data.cache_dir} has {cache.fingerprint}: corpus or tokenizer has changed"
        )
    if not same:
        known = open_cache(parent.data, "train").tokenizer.fingerprint
        if cache.tokenizer.fingerprint != known:
            raise ConfigError(
                f"config.data: its tokenizer has fingerprint {cache.tokenizer.fingerprint}, the "
                f"parent's {known}; the parent's model reads tokens of its own tokenizer only"
            )
