"""A checkpoint under another position embedding, without training: its experiment and its files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    Experiment,
    apply_overrides,
    build_experiment,
    experiment_to_dict,
    incompatible_changes,
)
from fope_jax.data.tokenizers import SentencePieceTokenizer
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import read_experiment
from fope_jax.evaluate.run_data import CACHE_DIR, DATA, TOKENIZER
from fope_jax.extend.arrays import POSITION_GROUPS, carry_position, with_position
from fope_jax.extend.frequencies import frequency_changes
from fope_jax.extend.lineage import lineage_of, log_position_change
from fope_jax.extend.parent import Parent, load_beside
from fope_jax.extend.request import (
    check_length,
    check_model,
    check_step,
    child_position,
    stated_overrides,
)
from fope_jax.interop.hub import PREFIX
from fope_jax.interop.tokenizer_files import TOKENIZER_FILES
from fope_jax.position import to_spec
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import is_main_process
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.directories import check_space
from fope_jax.storage.files import read_json_or_empty, write_json
from fope_jax.storage.paths import as_path
from fope_jax.train.state import plan_state
from fope_jax.train.workdir import (
    IMPORTED,
    KEPT,
    LINEAGE,
    RUN,
    UNTRAINED,
    open_workdir,
    write_run_info,
)

log = logging.getLogger(__name__)


def untrained_experiment(
    parent: Parent, method: str, length: int, overrides: Iterable[str] = ()
) -> Experiment:
    """The experiment of a parent with another position embedding, untrained.

    All but the position embedding is the parent's, also ``train.length``: evaluation counts in the
    length that the weights were trained on. Overrides may change its knobs and ``evaluate``.

    Args:
      method, overrides: as for ``child_experiment``.
      length: tokens that the position embedding is made for.

    Raises:
      ConfigError, ValueError: as ``child_experiment``; also an override of another section.
    """
    check_length(length)
    texts = stated_overrides(overrides)
    for key, text in texts.items():
        section = key.partition(".")[0]
        if section not in ("position", "evaluate", "model", "name") and key != "data.cache_dir":
            raise ConfigError(
                f"config.{key} = {text}: --no-train changes the position embedding alone; "
                "accepted: values of position and evaluate, model.windows, name and data.cache_dir"
            )
    check_step(parent.experiment.train, parent.step)
    position = child_position(parent.experiment, method, length, texts, True, parent.made_for)
    config = read_experiment(as_path(parent.source))  # of imported weights: its own train.length
    values = experiment_to_dict(config)
    values["name"] = f"{config.name}+{method}-{length}-untrained"
    values["position"] = to_spec(position)
    values["train"] |= {
        "first_lengths": (),
        "data_start": config.train.data_start + parent.step,
        "evaluate_every": None,
    }
    others = [f"{key}={text}" for key, text in texts.items() if not key.startswith("position.")]
    child = build_experiment(apply_overrides(ConfigDict(values), others))
    check_model(parent.experiment, child)
    return child


def check_untrained(parent: Parent, optimizer: str, config: ConfigDict | None) -> None:
    """Raises ConfigError for options that mean nothing without training, and without a run."""
    if parent.item is None:
        directory = parent.source.removeprefix(PREFIX)
        raise ConfigError(
            f"{parent.source}: --no-train shares the arrays of a run, and these are weights of "
            f"Hugging Face; `fope import {directory} --workdir RUN`, then `fope extend RUN`"
        )
    if optimizer == "keep":
        raise ConfigError("--optimizer keep: --no-train has no optimizer; leave the option out")
    if config is not None:
        raise ConfigError("--config FILE: --no-train keeps the parent's configuration")


def check_same_experiment(workdir: Path, child: Experiment) -> None:
    """Raises ConfigError if a workdir has the same request with other overrides."""
    stored = experiment_to_dict(read_experiment(workdir))
    if changes := incompatible_changes(stored, experiment_to_dict(child)):
        raise ConfigError(
            f"workdir {workdir} holds a run of another configuration; use another --workdir. "
            "Different:\n  " + "\n  ".join(changes)
        )


def save_untrained(
    parent: Parent, child: Experiment, workdir: Path, store: CheckpointStore, request: Any
) -> None:
    """Writes the files of the child and its checkpoint of step 0, which shares unchanged arrays.

    Unchanged items are hard links: neither run needs the other afterwards, also where the parent
    goes on, drops old checkpoints or is deleted. Changed ones (FoPE's coefficients, a stretched
    table) are the child's alone. There is no optimizer.

    Raises:
      CheckpointError: the parent's checkpoint is damaged, or has weights that are not finite.
      OSError: no room for what is written.
    """
    with fail_together():
        plan = plan_state(child)
    before, (arrays, metadata) = load_beside(parent, child)
    carried = carry_position(parent, before, arrays, child, request["match"])
    new = carried.variables
    trees = {
        "params": with_position(
            arrays["params"], new.model_params, new.layer_params, plan.state.params
        ),
        "constants": with_position({}, new.model_constants, new.layer_constants, plan.constants),
    }
    is_shared = {
        name: _position_names(arrays[name]) == _position_names(tree) <= carried.names
        for name, tree in trees.items()
    }
    items = {name: tree for name, tree in trees.items() if not is_shared[name]}
    assert parent.item is not None
    shared = {name: parent.item(name) for name in trees if is_shared[name]}
    fingerprint, identity = checkpoint_fingerprint(
        child.position, child.model.shape, trees["constants"]
    )
    frequencies = frequency_changes(before.position, child.position, child.model.shape.head_dim)
    position = {"hash": fingerprint.hash, "summary": fingerprint.summary}
    lineage = lineage_of(
        *(request, parent, metadata, child, request["length"]),
        *(fingerprint, frequencies, carried.text),
    )
    written = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
    with fail_together():
        if is_main_process():
            check_space(workdir, written, "what the parent does not have")
            open_workdir(workdir, child)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(trees["params"]))
            _write_facts(parent, child, workdir, parameters, position, request["length"])
            write_json(workdir / LINEAGE, lineage)
    store.save(0, items, identity | {"data": metadata["data"]}, shared)
    log.info("%s, step %d, as %s, without training", parent.source, parent.step, child.name)
    log_position_change(before, child, frequencies, carried.text)
    log.info(
        "checkpoint: %s of %s bytes shared with the parent (%s written)",
        ", ".join(shared) or "nothing",
        f"{sum(item.size for item in shared.values()):,}",
        f"{written:,}",
    )


def _position_names(tree: Mapping[str, Any]) -> set[str]:
    """Names of the position arrays of a tree of ``split``."""
    return {name for group in POSITION_GROUPS for name in tree.get(group, {})}


def _write_facts(
    parent: Parent,
    child: Experiment,
    workdir: Path,
    parameters: int,
    position: dict[str, str],
    length: int,
) -> None:
    """run.json and the tokenizer: the parent's, and what this run is."""
    source = as_path(parent.source)
    info = read_json_or_empty(source / RUN)
    facts = {"name": child.name, "seed": child.seed, "parameters": parameters, "position": position}
    facts |= {UNTRAINED: {"length": length}}
    if IMPORTED in info:
        trained = {"training_length": parent.experiment.train.length}
        facts |= {IMPORTED: info[IMPORTED] | trained}
    if KEPT in info:
        facts |= {KEPT: info[KEPT]}
    for name in {*TOKENIZER_FILES, SentencePieceTokenizer.filename}:
        if (source / name).is_file():
            (workdir / name).write_bytes((source / name).read_bytes())
    kept = {key: info[key] for key in (DATA, CACHE_DIR, TOKENIZER) if key in info}
    write_run_info(workdir, facts, 0, kept)
