"""`fope extend`: continues training at a longer length with another position embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fope_jax.config import ConfigError, Experiment, split_override
from fope_jax.data.cache_reader import TokenCache
from fope_jax.data.manifest import BUILD, CacheError, MissingCacheError
from fope_jax.evaluate.agreement import check_processes_agree
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.protocol_plan import plan_protocols, unstated_settings
from fope_jax.evaluate.run import evaluate
from fope_jax.evaluate.run_data import RunData, describe_data, find_run_data, load_run_tokenizer
from fope_jax.extend.arrays import carry_position, carry_train_state
from fope_jax.extend.child import child_experiment
from fope_jax.extend.frequencies import frequency_changes
from fope_jax.extend.initial_loss import WARN_ABOVE, compare_initial_losses
from fope_jax.extend.lineage import (
    check_request,
    data_changes,
    has_same_data,
    lineage_of,
    log_position_change,
    read_lineage,
)
from fope_jax.extend.parent import Parent, load_beside, open_parent
from fope_jax.extend.untrained import (
    check_same_experiment,
    check_untrained,
    save_untrained,
    untrained_experiment,
)
from fope_jax.interop.hub import PREFIX
from fope_jax.interop.huggingface import export_problem
from fope_jax.processes.agreement import fail_together
from fope_jax.processes.collectives import is_main_process
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.files import write_json
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path, resolve_path
from fope_jax.train.checkpoints import check_checkpoints_present
from fope_jax.train.loop import train
from fope_jax.train.state import plan_state
from fope_jax.train.workdir import (
    CHECKPOINTS,
    CONFIG,
    KEPT,
    LINEAGE,
    RUN,
    check_disk_space,
    check_workdir,
    has_checkpoint,
    open_workdir,
)

log = logging.getLogger(__name__)


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
    config: ConfigDict | None = None,
    accept_position: str | None = None,
    should_evaluate: bool = False,
    allow_shorter: bool = False,
    no_train: bool = False,
) -> None:
    """Makes a run with a checkpoint of step 0 from a parent, and trains it to its last step.

    After an interruption the same call resumes, with the same bits as an unbroken run.

    Args:
      source: the parent, ``runs/a``, ``runs/a/STEP``, ``hf:DIR`` or ``hf:ORG/NAME``; see
        ``open_parent``.
      method: the new position embedding, see ``methods.target_classes``.
      length, overrides, config: see ``child_experiment``.
      workdir: directory of the new run.
      optimizer: "keep", "reset-moments" or "reset", see ``carry_train_state``.
      match: how FoPE's frequencies are matched, see ``coefficients.match_frequencies``.
      warn_above: see ``compare_initial_losses``.
      accept_position: for the parent, see ``check_fingerprint``.
      should_evaluate: run `fope evaluate` afterwards; its protocols are checked first.
      allow_shorter: for a length not above the parent's, see ``extend_position``.
      no_train: only change the position embedding, see ``untrained.save_untrained``.

    Raises:
      ConfigError, ValueError: see ``child_experiment`` and ``open_parent``, or the workdir holds
        another run.
      CheckpointError, FileNotFoundError: see ``open_parent`` and ``train``.
    """
    workdir, overrides = as_path(workdir), list(overrides)
    tokenizer = dict(map(split_override, overrides)).get("data.tokenizer")
    if not tokenizer and config:
        tokenizer = config.to_dict().get("data", {}).get("tokenizer")
    with fail_together():
        has_begun = has_checkpoint(workdir)
        lineage = read_lineage(workdir) if has_begun else None
        step = lineage["request"]["step"] if lineage else None
        parent = open_parent(source, step, tokenizer, accept_position)
        if str(resolve_path(workdir)) == parent.source:
            raise ConfigError(f"workdir {workdir} is the parent itself; use another --workdir")
        request = {
            "parent": parent.source,
            "step": parent.step,
            "method": method,
            "length": length,
            "optimizer": optimizer,
            "match": match,
        }
        flags = {"allow_shorter": allow_shorter, "no_train": no_train}
        request |= {flag: True for flag, given in flags.items() if given}
        if has_begun:
            check_request(workdir, lineage, request)
        if no_train:
            check_untrained(parent, optimizer, config)
            child = untrained_experiment(parent, method, length, overrides)
        else:
            if optimizer == "keep" and parent.made_for:
                raise ConfigError(
                    f"{parent.source} was made without training and has no optimizer to keep; "
                    "take reset"
                )
            child = child_experiment(
                parent.experiment,
                parent.step,
                method,
                length,
                optimizer,
                overrides,
                is_imported=parent.is_imported,
                config=config,
                allow_shorter=allow_shorter,
                made_for=parent.made_for,
            )
        if no_train and has_begun:
            check_same_experiment(workdir, child)
            return
        check_workdir(workdir, child)
        data = _find_data(parent, child, workdir)
        if not (has_begun or no_train):  # before anything is written
            _open_cache(data, child, workdir, parent)
            if should_evaluate:
                stated = map(itemgetter(0), map(split_override, overrides))
                unstated = unstated_settings(child.evaluate, [*stated], is_extension=True)
                plan_protocols(child, data, unstated=unstated)
    check_processes_agree(child, request | {"--accept-position": accept_position}, data=data)
    with lock_run(workdir, "extend"):
        store = CheckpointStore(workdir / CHECKPOINTS, keep=child.train.keep)
        try:
            if store.latest_valid_step(quarantine=True) is None:
                check_checkpoints_present(workdir, None)
                if no_train:
                    save_untrained(parent, child, workdir, store, request)
                else:
                    _save_step_0(parent, child, data, workdir, store, request, warn_above)
        finally:
            store.close()
    if no_train:
        return
    train(child, workdir)
    if should_evaluate:
        evaluate(workdir)


def _save_step_0(
    parent: Parent,
    child: Experiment,
    data: RunData,
    workdir: Path,
    store: CheckpointStore,
    request: dict[str, Any],
    warn_above: float,
) -> None:
    # ------------------------------------------------------------------ the parent's arrays
    with fail_together():
        cache, plan = _open_cache(data, child, workdir, parent), plan_state(child)
        check_disk_space(workdir, plan, child.train)
    before, loaded = load_beside(parent, child, request["optimizer"] == "keep")
    arrays, metadata = loaded
    _check_data(parent, metadata["data"], child, cache)

    # ------------------------------------------------------------------ the child's arrays
    carried = carry_position(parent, before, arrays, child, request["match"])
    state, constants = carry_train_state(arrays, carried, plan, request["optimizer"])

    # ------------------------------------------------------------------ lineage
    fingerprint, identity = checkpoint_fingerprint(child.position, child.model.shape, constants)
    frequencies = frequency_changes(before.position, child.position, child.model.shape.head_dim)
    changes = data_changes(before, child, cache, parent.is_imported)
    log.info("%s, step %d, goes on as %s", parent.source, parent.step, child.name)
    log_position_change(before, child, frequencies, carried.text)
    log.info("data: %s", changes["text"])
    if problem := export_problem(child.model, child.position):
        log.info("this run cannot be exported to Hugging Face: %s", problem)
    if child.evaluate.add_bos_token:
        log.info(
            "BOS token: training text has none, its documents are joined by their end-of-document "
            "token; windows that are evaluated begin with %s (evaluate.add_bos_token)",
            child.evaluate.bos_token,
        )
    start = compare_initial_losses(
        before, arrays, child, state, constants, data.open("validation"), warn_above
    )
    lineage = lineage_of(
        *(request, parent, metadata, child, child.train.length),
        *(fingerprint, frequencies, carried.text, changes, start),
    )

    # ------------------------------------------------------------------ files
    with fail_together():
        if is_main_process():
            open_workdir(workdir, child)
            kept = {KEPT: parent.kept} if parent.kept else {}
            # `train` adds the rest.
            write_json(workdir / RUN, kept | describe_data(cache, data.config))
            write_json(workdir / LINEAGE, lineage)
    items = {"params": state.params, "constants": constants, "optimizer": state.optimizer}
    store.save(0, items, identity | {"data": cache.fingerprint})


def _find_data(parent: Parent, child: Experiment, workdir: Path) -> RunData:
    """The token cache of an extension: its own once it has begun, before that its parent's."""
    if has_checkpoint(workdir):
        return find_run_data(workdir, child.data)
    if parent.source.startswith(PREFIX) or not has_same_data(parent.experiment, child):
        return RunData(child.data)
    return find_run_data(parent.source, child.data)


def _open_cache(data: RunData, child: Experiment, workdir: Path, parent: Parent) -> TokenCache:
    """The child's tokens; the error for a missing cache names a configuration to build it with."""
    try:
        return data.open("train")
    except MissingCacheError as error:
        path, values = as_path(parent.source) / CONFIG, ", with the same --config.data values"
        if parent.source.startswith(PREFIX):  # there may be no other configuration file
            path, values = workdir / CONFIG, ""
            if is_main_process():
                open_workdir(workdir, child)
        text = str(error).replace(BUILD, f"fope data build --config {path}")
        raise CacheError(f"{text}{values}") from error


def _check_data(
    parent: Parent, fingerprint: str | None, child: Experiment, cache: TokenCache
) -> None:
    """Raises ConfigError if the child's token ids mean something else than the parent's."""
    if fingerprint is None:  # imported weights, which may have no token cache
        tokenizer = parent.experiment.data.tokenizer
        if child.data.tokenizer != tokenizer:
            raise ConfigError(
                f"config.data.tokenizer = {child.data.tokenizer!r}: the parent's is "
                f"{tokenizer!r}, and its model reads tokens of no other"
            )
    else:
        known = load_run_tokenizer(parent.source, parent.experiment.data).fingerprint
        if cache.tokenizer.fingerprint != known:
            raise ConfigError(
                f"config.data: its tokenizer has fingerprint {cache.tokenizer.fingerprint}, the "
                f"parent's {known}; the parent's model reads tokens of its own tokenizer only"
            )
