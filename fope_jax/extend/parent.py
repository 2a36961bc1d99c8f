"""The parent of an extension: another run, or Hugging Face weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fope_jax.config import ConfigError, Experiment
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import find_step, read_experiment
from fope_jax.interop.families import MAX_POSITIONS
from fope_jax.interop.hub import PREFIX, local_checkpoint
from fope_jax.interop.run_import import (
    check_tokenizer,
    imported_experiment,
    is_tokenizer_compatible,
)
from fope_jax.interop.tokenizer_files import TOKENIZER
from fope_jax.interop.weights import import_config, import_weights
from fope_jax.model.config import RUNTIME_FIELDS
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.sharding import device_put_sharded
from fope_jax.storage.checkpoint import CheckpointError, CheckpointStore
from fope_jax.storage.files import read_json_or_empty
from fope_jax.storage.paths import resolve_path
from fope_jax.storage.run_paths import split_step
from fope_jax.storage.step_save import StoredItem
from fope_jax.train.checkpoints import restore_checked
from fope_jax.train.state import StatePlan, plan_state
from fope_jax.train.workdir import CHECKPOINTS, IMPORTED, KEPT, RUN, UNTRAINED


class ParentArrays(NamedTuple):
    """Arrays and metadata of a checkpoint; ``metadata["data"]`` is None for imported weights."""

    items: dict[str, Any]
    metadata: dict[str, Any]


class Parent(NamedTuple):
    """A trained model to continue from.

    Attributes:
      source: its path, for messages and lineage.json.
      experiment: its experiment; ``train.length`` is the length it was trained on.
      is_imported: the weights were imported, without optimizer state or training data.
      kept: further fields of an imported config.json, for an export.
      load: (state plan, with optimizer) -> arrays; CheckpointError if they are damaged.
      made_for: length of its positions where they were changed without training, else None.
      item: name -> item of its checkpoint, for a run that shares it; None for Hugging Face weights.
    """

    source: str
    experiment: Experiment
    step: int
    is_imported: bool
    kept: dict[str, Any]
    load: Callable[[StatePlan, bool], ParentArrays]
    made_for: int | None = None
    item: Callable[[str], StoredItem] | None = None

    @property
    def table_rows(self) -> int:
        """Rows of a learned table that are trained, or lie between such where it was stretched."""
        return max(self.experiment.train.trained_positions, self.made_for or 0)


def open_parent(
    source: str | Path,
    step: int | None = None,
    tokenizer: str | None = None,
    accept_position: str | None = None,
) -> Parent:
    """Opens and checks a parent; only ``load`` reads its arrays.

    Args:
      source: a run ``runs/a``, a checkpoint ``runs/a/500``, or Hugging Face weights,
        ``hf:models/SmolLM-1.7B`` or ``hf:ORG/NAME``, see ``local_checkpoint``.
      step: of the checkpoint, if ``source`` names none; None means the newest valid one.
      tokenizer: for Hugging Face weights without a tokenizer.json that fits the embedding.
      accept_position: see ``check_fingerprint``.

    Raises:
      FileNotFoundError: no run, no valid checkpoint, or no weights.
      CheckpointError: there is no checkpoint of that step.
      ConfigError: Hugging Face weights have no fitting tokenizer.json, and none is given.
      ValueError: see ``import_weights``.
    """
    if str(source).startswith(PREFIX):
        return _open_weights(local_checkpoint(source), tokenizer)
    return _open_run(source, step, accept_position)


def _open_run(source: str | Path, step: int | None, accept_position: str | None) -> Parent:
    run, named_step = split_step(source)
    experiment = read_experiment(run)
    store = CheckpointStore(run / CHECKPOINTS)  # one, which hashes the files of a step once
    if step is None and named_step is not None:  # an extension that has begun may outlive it
        store.check_exists(named_step)
    step = step if named_step is None else named_step
    step = find_step(run, store, None) if step is None else step

    def load(plan: StatePlan, with_optimizer: bool) -> ParentArrays:
        arrays = restore_checked(store, step, experiment, plan, accept_position, with_optimizer)
        return ParentArrays(arrays, store.metadata(step))

    def item(name: str) -> StoredItem:
        return store.item(step, name)

    facts = read_json_or_empty(run / RUN)
    kept, trained = facts.get(KEPT, {}), experiment
    made_for = facts.get(UNTRAINED, {}).get("length")
    if IMPORTED in facts:  # their train.length is the unit of evaluation lengths
        stated = kept.get(MAX_POSITIONS, experiment.train.length)
        length = facts[IMPORTED].get("training_length", stated)
        config = dataclasses.replace(experiment.train, length=length)
        trained = dataclasses.replace(experiment, train=config)
    is_imported = IMPORTED in facts
    return Parent(str(resolve_path(run)), trained, step, is_imported, kept, load, made_for, item)


def _open_weights(directory: Path, tokenizer: str | None) -> Parent:
    config = import_config(directory)
    overrides = [] if tokenizer is None else [f"data.tokenizer={tokenizer}"]
    has_tokenizer = (directory / TOKENIZER).is_file()
    experiment = imported_experiment(directory, config, [] if has_tokenizer else overrides)
    if has_tokenizer and overrides and not is_tokenizer_compatible(experiment):
        experiment = imported_experiment(directory, config, overrides)  # tokenizer.json is unfit
    check_tokenizer(experiment)

    def load(plan: StatePlan, with_optimizer: bool) -> ParentArrays:
        if with_optimizer:
            raise ConfigError(f"{PREFIX}{directory} holds no optimizer to keep; take reset")
        model = import_weights(directory)
        _, identity = checkpoint_fingerprint(model.position, model.config.shape, model.constants)
        items = jax.tree.map(
            lambda x, leaf: device_put_sharded(x, leaf.sharding),
            {"params": model.params, "constants": model.constants},
            {"params": plan.state.params, "constants": plan.constants},
        )
        return ParentArrays(items, identity | {"data": None})

    source = f"{PREFIX}{directory.resolve()}"
    return Parent(source, experiment, 0, True, config.extra_keys, load)


def load_beside(
    parent: Parent, child: Experiment, with_optimizer: bool = False
) -> tuple[Experiment, ParentArrays]:
    """The parent's experiment on the devices of its child, with the child's runtime settings, and
    its arrays; CheckpointError if weights are not finite."""
    changes = {name: getattr(child.model, name) for name in RUNTIME_FIELDS}
    model = dataclasses.replace(parent.experiment.model, **changes)
    experiment = dataclasses.replace(parent.experiment, mesh=child.mesh, model=model)
    loaded = parent.load(plan_state(experiment), with_optimizer)
    trees = {name: loaded.items[name] for name in ("params", "constants")}
    if counts := count_non_finite(trees):
        raise CheckpointError(
            f"{parent.source}, step {parent.step}: weights that are not finite, from which no run "
            f"can go on: {describe_non_finite(counts)}"
        )
    return experiment, loaded
