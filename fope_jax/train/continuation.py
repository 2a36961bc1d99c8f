"""A finished run that is trained longer: the same run, with more steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    Experiment,
    TrainConfig,
    apply_overrides,
    build_experiment,
    experiment_to_dict,
    split_override,
)
from fope_jax.evaluate.restore import read_experiment
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.files import read_json_or_empty
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import IMPORTED
from fope_jax.train.optim import describe_rate, learning_rate
from fope_jax.train.workdir import CHECKPOINTS, CONFIG, CONTINUED, RUN, UNTRAINED

log = logging.getLogger(__name__)


def continued_experiment(
    workdir: str | Path, steps: int, overrides: Sequence[str] = ()
) -> Experiment:
    """The experiment of a finished run with ``steps`` more updates; writes nothing.

    A constant learning rate goes on, so that the run ends as one that had all its steps from the
    beginning. A cosine decay has ended: its last rate is kept (``train.decay_steps``).

    The same request again, while its steps are not all done, asks for the same end.

    Args:
      workdir: directory of the run.
      steps: updates after the last one, 1 or more.
      overrides: values that may change when a run resumes, as ``"--config.train.save_every=100"``.

    Raises:
      FileNotFoundError: not a run.
      ConfigError: the run is not finished, its schedule has ended at a rate of 0, or an override
        is invalid.
    """
    workdir = as_path(workdir)
    experiment = read_experiment(workdir)
    if any(split_override(override)[0] == "train.steps" for override in overrides):
        raise ConfigError("config.train.steps: --continue-for says how many steps are added")
    store = CheckpointStore(workdir / CHECKPOINTS)
    end = _find_end(workdir, experiment.train, store.newest_step(), steps)
    store.close()
    changes = [f"train.steps={end}"]
    if experiment.train.schedule == "cosine" and experiment.train.decay_steps is None:
        changes.append(f"train.decay_steps={experiment.train.steps}")
    values = ConfigDict(experiment_to_dict(experiment))
    longer = build_experiment(apply_overrides(values, [*changes, *overrides]))
    if not learning_rate(longer.train, end - 1):
        raise ConfigError(
            f"workdir {workdir}: its cosine decay has ended at a learning rate of 0, with which "
            f"nothing is learnt; `fope extend {workdir} --method same --length "
            f"{longer.train.length} --workdir NEW` begins another schedule"
        )
    log.info("%s: %d steps more, to %d; %s", workdir, steps, end, describe_rate(longer.train))
    return longer


def _find_end(workdir: Path, config: TrainConfig, trained: int, steps: int) -> int:
    """The last step of a continuation: that of an unfinished one, else ``steps`` from here."""
    info = read_json_or_empty(workdir / RUN)
    if {IMPORTED, UNTRAINED} & info.keys():
        raise ConfigError(
            f"workdir {workdir} holds weights that no training here has made; `fope extend "
            f"{workdir} --method same --length {config.length} --allow-shorter --workdir NEW` goes "
            "on from them"
        )
    for record in info.get(CONTINUED, [])[-1:]:
        if record["to"] - record["from"] == steps and record["from"] <= trained < record["to"]:
            return record["to"]
    if trained < config.steps:
        raise ConfigError(
            f"workdir {workdir} has trained {max(trained, 0)} of its {config.steps} steps; `fope "
            f"train --config {workdir / CONFIG} --workdir {workdir}` does the rest first"
        )
    return trained + steps
