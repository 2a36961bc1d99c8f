"""Exports a run as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fope_jax.config import Experiment
from fope_jax.data import DataConfig
from fope_jax.data.tokenizers import Tokenizer
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import LoadedRun, load_run
from fope_jax.evaluate.run_data import load_run_tokenizer
from fope_jax.interop.families import MAX_POSITIONS
from fope_jax.interop.huggingface import family_of
from fope_jax.interop.model_card import UNKNOWN_LICENSE, CardFacts, model_card
from fope_jax.interop.tokenizer_files import TOKENIZER, BosPolicy, special_ids, write_tokenizer
from fope_jax.interop.weights import export_weights
from fope_jax.model.transformer import split
from fope_jax.storage.directories import (
    check_output,
    check_space,
    make_directory,
    remove_empty_directories,
    remove_tree,
)
from fope_jax.storage.files import read_json, read_json_or_empty, write_text
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import CONFIG, LINEAGE, split_step
from fope_jax.train.workdir import KEPT, UNTRAINED

PARTIAL = ".partial"  # directory of an unfinished export
_MODE = 0o644


def export_run(
    run: str | Path,
    directory: str | Path,
    step: int | None = None,
    dtype: str | None = None,
    accept_position: str | None = None,
    license: str = UNKNOWN_LICENSE,
) -> str:
    """Writes one checkpoint of a run as a Hugging Face checkpoint.

    It has the weights, the tokenizer, generation_config.json and a model card; ``import_run`` makes
    a run with the same model of it.

    Args:
      run: a run directory, or one with a step: ``runs/fope/500``.
      directory: to create.
      step: of the checkpoint; None takes the newest valid one.
      dtype: of the tensors, see ``export_weights``.
      accept_position: see ``check_fingerprint``.
      license: of the weights, for the model card.

    Returns one line about the model. Raises ValueError if Hugging Face does not support the model,
    CheckpointError if it was trained with another position embedding, OSError for a missing run.
    """
    directory = as_path(directory)
    if directory.is_dir() and any(path.name != PARTIAL for path in directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: export into a new directory")
    check_output(directory, "the checkpoint")
    run, step = split_step(run, step)
    loaded = load_run(run, step, accept_position=accept_position)
    size = sum(x.nbytes for x in jax.tree.leaves(split(loaded.model)[1]))
    check_space(directory, size // (1 if dtype in (None, "float32") else 2), "the checkpoint")
    # Written to a subdirectory first, so that an interrupted export does not look complete.
    partial = directory / PARTIAL
    made = make_directory(directory)
    remove_tree(partial)
    try:
        _write_checkpoint(partial, directory.resolve().name, run, loaded, dtype, license)
        for path in partial.iterdir():
            path.chmod(_MODE)  # libraries make files that their owner alone can read
            path.rename(directory / path.name)
        partial.rmdir()
    except BaseException:
        remove_tree(partial)
        remove_empty_directories(made)
        raise
    model = loaded.model
    position, _ = checkpoint_fingerprint(model.position, model.config.shape, split(model)[2])
    return f"{run}, step {loaded.step}: position {position.summary}"


def _write_checkpoint(
    directory: Path, name: str, run: Path, loaded: LoadedRun, dtype: str | None, license: str
) -> None:
    """All files of an export, into a directory that does not exist."""
    model, experiment, info = loaded.model, loaded.experiment, loaded.run_info
    _, params, constants = split(model)
    tokenizer = _read_tokenizer(run, experiment.data)
    source, bos = _tokenizer_json(run, experiment.data), _bos_policy(run, experiment, info)
    extra_keys: dict[str, Any] = info.get(KEPT) or special_ids(tokenizer, bos)
    stretched = info.get(UNTRAINED, {}).get("length", 0)  # what its positions are made for
    length = max(experiment.train.length, extra_keys.get(MAX_POSITIONS, 0), stretched)
    export_weights(
        directory,
        model.config,
        model.position,
        params,
        constants,
        length=length,
        training_length=experiment.train.length,
        extra_keys=extra_keys,
        dtype=dtype,
    )
    facts = CardFacts(
        name=name,
        run=str(run),
        step=loaded.step,
        experiment=experiment,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        model_type=family_of(model.config, model.position),
        info=info,
        lineage=read_json_or_empty(run / LINEAGE),
        tokenizer=write_tokenizer(directory, tokenizer, source, bos, length),
        license=license,
    )
    write_text(directory / "README.md", model_card(facts))


def _read_tokenizer(run: Path, data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run; None if it cannot be read."""
    try:
        return load_run_tokenizer(run, data)
    except (ValueError, OSError, RuntimeError):
        return None


def _tokenizer_json(run: Path, data: DataConfig) -> Path | None:
    """The tokenizer.json of a run: its own, or the one it was made with; None if it has none."""
    if not data.tokenizer.endswith(".json"):
        return None
    own = run / TOKENIZER
    return own if own.is_file() else as_path(data.tokenizer)


def _bos_policy(run: Path, experiment: Experiment, info: Mapping[str, Any]) -> BosPolicy | None:
    """What evaluation does; None for weights that an older version imported without asking."""
    stated = read_json(run / CONFIG).get("evaluate", {})
    if KEPT in info and "add_bos_token" not in stated:
        return None
    evaluate = experiment.evaluate
    return BosPolicy(evaluate.bos_token if evaluate.add_bos_token else None)
