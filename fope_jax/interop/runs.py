"""Runs made of Hugging Face checkpoints, and such checkpoints made of runs."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    EvaluateConfig,
    Experiment,
    TrainConfig,
    apply_overrides,
    build_experiment,
    experiment_to_dict,
    split_override,
)
from fope_jax.data import DataConfig
from fope_jax.data.bos import CheckpointBos, read_bos
from fope_jax.data.tokenizers import BytesTokenizer, JsonTokenizer, SentencePieceTokenizer
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import load_run
from fope_jax.extras import require
from fope_jax.interop.huggingface import MAX_POSITIONS, ImportedConfig
from fope_jax.interop.weights import (
    ImportedModel,
    export_weights,
    import_config,
    import_weights,
    position_fingerprint,
)
from fope_jax.model.config import RUNTIME_FIELDS
from fope_jax.model.transformer import split
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.content import detect_content, read_head
from fope_jax.storage.directories import (
    check_output,
    check_space,
    make_directory,
    remove_empty_directories,
    remove_tree,
)
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path
from fope_jax.train.workdir import (
    CHECKPOINTS,
    IMPORTED,
    KEPT,
    check_workdir,
    open_workdir,
    split_step,
    write_run_info,
)

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
PARTIAL = ".partial"  # in the directory of an export that has not ended
BESIDE = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def import_run(source: str | Path, workdir: str | Path, overrides: Iterable[str] = ()) -> str:
    """Makes a run directory with the weights of a Hugging Face checkpoint as step 0.

    Args:
      source: directory of the checkpoint, see ``import_weights``. Its tokenizer.json, where it has
        one, becomes ``data.tokenizer``.
      workdir: of the run.
      overrides: as of ``load_config``. ``train.length``, of which evaluation takes multiples, is
        the checkpoint's ``max_position_embeddings`` unless given.

    Returns:
      One line about the model.

    Raises:
      ConfigError: an override that cannot be or would change the model, no tokenizer or one of more
        tokens than the embedding, or a workdir that holds something else.
      ValueError: see ``import_weights``.
      OSError: a file is missing, or the workdir cannot be written.
    """
    source, workdir, overrides = Path(source), as_path(workdir), list(overrides)
    experiment = imported_experiment(source, import_config(source), overrides)
    check_tokenizer(experiment)
    check_workdir(workdir, experiment)  # before the weights are read, which may take minutes
    imported = import_weights(source)
    shape = imported.config.shape
    position, identity = checkpoint_fingerprint(imported.position, shape, imported.constants)
    items = {"params": imported.params, "constants": imported.constants}
    arrays = jax.tree.leaves(items)
    check_space(workdir, sum(x.size * x.dtype.itemsize for x in arrays), "a checkpoint")
    parameters = sum(x.size for x in jax.tree.leaves(imported.params))
    facts = {
        "name": experiment.name,
        "seed": experiment.seed,
        "parameters": parameters,
        "position": {"hash": position.hash, "summary": position.summary},
        IMPORTED: {"directory": str(source)},
        KEPT: imported.kept,
    }
    with lock_run(workdir, "import"):
        open_workdir(workdir, experiment)
        write_run_info(workdir, facts, 0)
        store = CheckpointStore(workdir / CHECKPOINTS)
        try:  # last: before it is there the workdir holds nothing
            store.save(0, items, identity | {"data": None})
        finally:
            store.close()
    return f"{source}: {parameters:,} parameters, position {position.summary}"


def imported_experiment(
    source: Path, imported: ImportedModel | ImportedConfig, overrides: Iterable[str] = ()
) -> Experiment:
    """The experiment that a checkpoint of Hugging Face in ``source`` stands for, of no update.

    Raises:
      ConfigError: see ``import_run``.
    """
    overrides = list(overrides)
    tokenizer = source / TOKENIZER
    stated = dict(map(split_override, overrides))
    if not tokenizer.is_file() and "data.tokenizer" not in stated:
        raise ConfigError(
            f"{source} has no {TOKENIZER}: say which one its tokens are of, such as"
            f" --config.data.tokenizer=PATH/{TOKENIZER}"
        )
    data = DataConfig(tokenizer=str(tokenizer)) if tokenizer.is_file() else DataConfig()
    length = imported.kept[MAX_POSITIONS]
    bos = read_bos(Path(stated.get("data.tokenizer", tokenizer)))
    base = Experiment(
        name=source.resolve().name,
        seed=0,
        model=imported.config,
        position=imported.position,
        data=data,
        # Step 0 is all there is; the length is what evaluation goes by.
        train=TrainConfig(steps=1, batch_size=1, length=length, warmup_steps=0),
        evaluate=EvaluateConfig(bos_token=bos.token, add_bos_token=bos.added),
    )
    config = apply_overrides(ConfigDict(experiment_to_dict(base)), overrides)
    experiment = build_experiment(config)
    chosen = {name: getattr(experiment.model, name) for name in RUNTIME_FIELDS}
    for name, old, new in (
        ("model", dataclasses.replace(imported.config, **chosen), experiment.model),
        ("position", imported.position, experiment.position),
    ):
        if old != new:
            raise ConfigError(
                f"config.{name} = {new}, but the weights are of {old}; an import can change "
                f"{', '.join(f'model.{how}' for how in RUNTIME_FIELDS)} only"
            )
    _log_bos(experiment.evaluate, bos)
    return experiment


def _log_bos(settings: EvaluateConfig, stated: CheckpointBos) -> None:
    token, added = settings.bos_token, settings.add_bos_token
    does = f"{token} is {'added' if added else 'not added'} to evaluated texts" if token else "none"
    changed = (token, added) != (stated.token, stated.added)
    source = "as the configuration has it" if changed else stated.source
    log.info("BOS token: %s (%s)", does, source)


def is_tokenizer_compatible(imported: Experiment) -> bool:
    """Whether the embedding has a row for each token; more rows are padding, and fine.

    A file that is no tokenizer is named where text is read; weights can do without.
    """
    size = _vocabulary(imported.data)
    return size is None or size <= imported.model.vocab_size


def check_tokenizer(imported: Experiment) -> None:
    """Raises ConfigError where the tokenizer has tokens that the imported embedding lacks.

    So it does where there is plainly none to compare: no such file, or a Git LFS pointer.
    """
    path = Path(imported.data.tokenizer)
    if path.suffix == ".json":
        found = detect_content(read_head(path))
        if found or not path.is_file():
            what = f"it is {found.kind}; {found.advice}" if found else "there is no such file"
            raise ConfigError(f"data.tokenizer = {str(path)!r}: {what}")
    if not is_tokenizer_compatible(imported):
        size = _vocabulary(imported.data)
        raise ConfigError(
            f"the tokenizer {imported.data.tokenizer} has {size:,} tokens, the embedding of "
            f"{imported.name} has {imported.model.vocab_size:,}, and an import does not change it: "
            "name the tokenizer that the model was trained with, "
            f"--config.data.tokenizer=PATH/{TOKENIZER}, or make the embedding larger before "
            f"(resize_token_embeddings({size}) of transformers, then save_pretrained)"
        )


def _vocabulary(data: DataConfig) -> int | None:
    """How many tokens a tokenizer has, as its largest id says; None where it cannot be read."""
    if data.tokenizer == "bytes":
        return BytesTokenizer.vocab_size
    if data.tokenizer == "sentencepiece":
        return data.vocab_size
    try:
        stored = require("tokenizers", "train").Tokenizer.from_file(data.tokenizer)
    except ImportError:
        raise
    except Exception:  # the library's own kind: no such file, or no tokenizer
        return None
    return max(stored.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def export_run(
    run: str | Path,
    directory: str | Path,
    step: int | None = None,
    dtype: str | None = None,
    accept_position: str | None = None,
) -> str:
    """Writes one checkpoint of a run as a Hugging Face checkpoint, its tokenizer.json with it.

    Args:
      run: a run directory, or one with a step behind it: ``runs/fope/500``.
      directory: made.
      step: which checkpoint; None takes the newest valid one.
      dtype: of the tensors, see ``export_weights``.
      accept_position: see ``check_fingerprint``.

    Returns:
      One line about the model.

    Raises:
      ValueError: the run has what Hugging Face cannot say, naming the field.
      CheckpointError: the checkpoint was trained with another position embedding.
      OSError: there is no such run, or the directory cannot be written.
    """
    directory = Path(directory)
    if directory.is_dir() and any(path.name != PARTIAL for path in directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: export into a new directory")
    check_output(directory, "the checkpoint")
    workdir, named = split_step(run)
    if named is not None and step is not None and step != named:
        raise ConfigError(f"--run {run} and --step {step}: leave one out")
    run, step = workdir, step if named is None else named
    loaded = load_run(run, step, accept_position=accept_position)
    _, params, constants = split(loaded.model)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    check_space(directory, size // (1 if dtype in (None, "float32") else 2), "the checkpoint")
    kept = loaded.run_info.get(KEPT, {})
    data = loaded.experiment.data
    eos = None if kept else _end_of_document(data)
    # What was begun there and not finished is begun anew, and nothing of it is taken for a whole.
    partial = directory / PARTIAL
    made = make_directory(directory)
    remove_tree(partial)
    try:
        export_weights(
            partial,
            loaded.model.config,
            loaded.model.position,
            params,
            constants,
            length=max(loaded.experiment.train.length, kept.get(MAX_POSITIONS, 0)),
            kept=kept or {"eos_token_id": eos},
            dtype=dtype,
        )
        if data.tokenizer.endswith(".json"):
            for name in BESIDE:
                path = Path(data.tokenizer).with_name(name)
                if path.is_file():
                    shutil.copyfile(path, partial / name)
        for path in partial.iterdir():
            path.rename(directory / path.name)
        partial.rmdir()
    except BaseException:
        remove_tree(partial)
        remove_empty_directories(made)
        raise
    model = loaded.model
    summary = position_fingerprint(model.config, model.position, constants).summary
    return f"{run}, step {loaded.step}: position {summary}"


def _end_of_document(data: DataConfig) -> int | None:
    """The token that ends a document, where the tokenizer is there to ask."""
    own = {"bytes": BytesTokenizer.eos_id, "sentencepiece": SentencePieceTokenizer.eos_id}
    if data.tokenizer in own:
        return own[data.tokenizer]
    path = Path(data.tokenizer)
    return JsonTokenizer.load(path).eos_id if path.is_file() else None
