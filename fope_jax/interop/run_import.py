"""Imports a Hugging Face checkpoint or a GGUF file as a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    EvaluateConfig,
    Experiment,
    TrainConfig,
    apply_overrides,
    build_experiment,
    differing_values,
    experiment_to_dict,
    flat_values,
    split_override,
)
from fope_jax.data import DataConfig
from fope_jax.data.bos import read_bos
from fope_jax.data.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Tokenizer,
    TokenizerError,
    describe_tokenizer,
)
from fope_jax.evaluate.fingerprint import checkpoint_fingerprint
from fope_jax.evaluate.restore import read_experiment
from fope_jax.evaluate.run_data import TOKENIZER as RUN_TOKENIZER
from fope_jax.extras import require
from fope_jax.interop.gguf import (
    SUFFIX,
    import_gguf_config,
    import_gguf_weights,
    is_gguf,
    open_gguf,
)
from fope_jax.interop.gguf_tokenizer import write_gguf_tokenizer
from fope_jax.interop.hub import origin_of
from fope_jax.interop.huggingface import ImportedConfig
from fope_jax.interop.tokenizer_files import TOKENIZER, copy_tokenizer
from fope_jax.interop.weights import ImportedModel, import_config, import_weights
from fope_jax.model.config import RUNTIME_FIELDS
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.content import detect_content, read_head
from fope_jax.storage.directories import check_space
from fope_jax.storage.files import file_sha256, read_json
from fope_jax.storage.lock import lock_run
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import CHECKPOINTS, CONFIG
from fope_jax.train.workdir import (
    IMPORTED,
    KEPT,
    RUN,
    UNTRAINED,
    check_workdir,
    has_checkpoint,
    open_workdir,
    write_run_info,
)

log = logging.getLogger(__name__)


def import_run(source: str | Path, workdir: str | Path, overrides: Iterable[str] = ()) -> str:
    """Makes a run with a Hugging Face checkpoint as step 0; returns one line about the model.

    Args:
      source: directory of the checkpoint, or a GGUF file; its tokenizer becomes ``data.tokenizer``.
      workdir: of the run.
      overrides: as in ``load_config``. ``train.length``, of which evaluation takes multiples,
        defaults to the checkpoint's ``max_position_embeddings``, or what an export states.

    A finished import of the same weights with the same configuration is left as it is.

    Raises ConfigError if an override is unknown or changes the model, the tokenizer is missing,
    broken or too large for the embedding, or the workdir holds something else; OSError if it cannot
    be written; or as ``import_weights`` and ``open_gguf``.
    """
    source, workdir, overrides = as_path(source), as_path(workdir), list(overrides)
    if is_gguf(source):
        return _import_gguf(source, workdir, overrides)
    _check_is_no_directory_of_gguf(source)
    config = import_config(source)
    experiment = imported_experiment(source, config, overrides)
    check_tokenizer(experiment)
    origin = origin_of(source.absolute())
    facts = {"directory": str(source.absolute()), "training_length": config.training_length}
    facts |= origin._asdict() if origin else {}
    tokenizer = experiment.data.tokenizer
    read_weights = functools.partial(import_weights, source)
    return _save_import(workdir, experiment, facts, tokenizer, read_weights)


def _import_gguf(path: Path, workdir: Path, overrides: list[str]) -> str:
    """As `import_run`, of a file, whose tokenizer is rebuilt unless another is given."""
    file = open_gguf(path)
    config = import_gguf_config(file)
    is_rebuilt = "data.tokenizer" not in dict(map(split_override, overrides))
    with tempfile.TemporaryDirectory() as scratch:
        if is_rebuilt:
            write_gguf_tokenizer(file, Path(scratch))
        experiment = imported_experiment(Path(scratch), config, overrides, name=path.stem)
        check_tokenizer(experiment, f"in {path}" if is_rebuilt else None)
        tokenizer = experiment.data.tokenizer
        if is_rebuilt:  # the run will have it
            copy = str(workdir.absolute() / TOKENIZER)
            data = dataclasses.replace(experiment.data, tokenizer=copy)
            experiment = dataclasses.replace(experiment, data=data)
        facts = {"directory": str(path.absolute()), "sha256": file_sha256(path)}
        facts |= {"quantisations": file.quantisations, "training_length": config.training_length}
        read_weights = functools.partial(import_gguf_weights, file)
        return _save_import(workdir, experiment, facts, tokenizer, read_weights)


def _is_imported(
    workdir: Path, experiment: Experiment, facts: Mapping[str, Any], tokenizer: str
) -> bool:
    """Whether a workdir holds the finished import of ``experiment`` with the origin ``facts``.

    A directory without a commit is known by its path, a ``tokenizer`` by its file. Raises
    ConfigError if the workdir holds something else, CheckpointError if its checkpoint is damaged.
    """
    has_files = (workdir / CONFIG).is_file() and (workdir / RUN).is_file()
    info = read_json(workdir / RUN) if has_files and has_checkpoint(workdir) else {}
    if IMPORTED not in info or UNTRAINED in info:
        check_workdir(workdir, experiment)
        return False
    with contextlib.closing(CheckpointStore(workdir / CHECKPOINTS)) as store:
        store.latest_valid_step()
    before = flat_values(read_experiment(workdir)) | _origin(info[IMPORTED])
    now = flat_values(experiment) | _origin(facts)
    copy, source = workdir / TOKENIZER, as_path(tokenizer)
    if copy.is_file() and source.is_file() and copy.read_bytes() == source.read_bytes():
        before["data.tokenizer"] = now["data.tokenizer"]  # the run may have been moved
    changes = [f"{key}: {old!r}, now {new!r}" for key, old, new in differing_values(before, now)]
    if changes:
        raise ConfigError(
            f"workdir {workdir} holds weights imported from {info[IMPORTED]['directory']}, but "
            "others or in another way; use another --workdir. Different:\n  " + "\n  ".join(changes)
        )
    return True


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What says which weights were imported: a checksum, a commit, or else the path."""
    names = [name for name in ("sha256", "commit") if name in facts]
    return {n: facts[n] for n in names} or {"path": str(Path(facts["directory"]).absolute())}


def _check_is_no_directory_of_gguf(source: Path) -> None:
    """Raises ConfigError for a directory with GGUF files and no config.json."""
    files = sorted(source.glob(f"*{SUFFIX}")) if source.is_dir() else []
    if files and not (source / CONFIG).is_file():
        raise ConfigError(
            f"{source} is a directory of GGUF files: name one, as `fope import {files[0]}`"
        )


def _save_import(
    workdir: Path,
    experiment: Experiment,
    facts: Mapping[str, Any],
    tokenizer: str,
    read_weights: Callable[[], ImportedModel],
) -> str:
    """Writes the run unless it is there; ``import_run`` returns the line.

    Args:
      facts: where the weights come from, for run.json.
      tokenizer: as ``data.tokenizer``; a file is copied.
      read_weights: may take minutes, and is not called if the run is there.
    """
    source = facts["directory"]
    if _is_imported(workdir, experiment, facts, tokenizer):
        return f"{source} is in {workdir} already, imported with the same configuration"
    imported = read_weights()
    position, fingerprints = checkpoint_fingerprint(
        imported.position, imported.config.shape, imported.constants
    )
    items = {"params": imported.params, "constants": imported.constants}
    check_space(workdir, sum(x.nbytes for x in jax.tree.leaves(items)), "a checkpoint")
    parameters = sum(x.size for x in jax.tree.leaves(imported.params))
    info = {
        "name": experiment.name,
        "seed": experiment.seed,
        "parameters": parameters,
        "position": {"hash": position.hash, "summary": position.summary},
        IMPORTED: dict(facts),
        KEPT: imported.extra_keys,
    }
    with lock_run(workdir, "import"):
        open_workdir(workdir, experiment)
        write_run_info(workdir, info, 0, _keep_tokenizer(workdir, tokenizer))
        store = CheckpointStore(workdir / CHECKPOINTS)
        try:  # last: without a checkpoint the workdir counts as empty
            store.save(0, items, fingerprints | {"data": None})
        finally:
            store.close()
    return f"{source}: {parameters:,} parameters, position {position.summary}"


def _keep_tokenizer(workdir: Path, name: str) -> dict[str, Any]:
    """Copies the tokenizer into the workdir; returns what run.json keeps of it."""
    tokenizer: Tokenizer = BytesTokenizer()
    if name.endswith(".json"):
        copy_tokenizer(as_path(name), workdir)
        try:
            tokenizer = JsonTokenizer.load(as_path(name))
        except TokenizerError:  # weights are imported with any tokenizer
            return {}
        tokenizer.save(workdir)
    elif name != tokenizer.kind:
        return {}  # a SentencePiece model lies in the token cache
    return {RUN_TOKENIZER: describe_tokenizer(tokenizer)}


def imported_experiment(
    source: Path, imported: ImportedConfig, overrides: Iterable[str] = (), name: str | None = None
) -> Experiment:
    """The experiment of the checkpoint in ``source``, at step 0; raises as ``import_run``.

    ``name`` is that of the run, by default that of the repository or the directory.
    """
    overrides = list(overrides)
    tokenizer = source.absolute() / TOKENIZER  # config.json is read from any directory
    given_tokenizer = dict(map(split_override, overrides)).get("data.tokenizer")
    if not tokenizer.is_file() and given_tokenizer is None:
        raise ConfigError(
            f"{source} has no {TOKENIZER}: say which one its tokens are of, such as"
            f" --config.data.tokenizer=PATH/{TOKENIZER}"
        )
    data = DataConfig(tokenizer=str(tokenizer)) if tokenizer.is_file() else DataConfig()
    bos = read_bos(as_path(given_tokenizer or tokenizer))
    origin = origin_of(source.absolute())
    base = Experiment(
        name=name or (origin.name if origin else source.resolve().name),
        seed=0,
        model=imported.config,
        position=imported.position,
        data=data,
        # Step 0 is the only one; evaluation takes multiples of the length.
        train=TrainConfig(steps=1, batch_size=1, length=imported.training_length, warmup_steps=0),
        evaluate=EvaluateConfig(bos_token=bos.token, add_bos_token=bos.added),
    )
    experiment = build_experiment(apply_overrides(ConfigDict(experiment_to_dict(base)), overrides))
    _check_model(experiment, imported)
    token, added = experiment.evaluate.bos_token, experiment.evaluate.add_bos_token
    log.info(
        "BOS token: %s (%s)",
        f"{token} is {'added' if added else 'not added'} to evaluated texts" if token else "none",
        bos.source if (token, added) == (bos.token, bos.added) else "as the configuration has it",
    )
    return experiment


def _check_model(experiment: Experiment, imported: ImportedConfig) -> None:
    """Raises ConfigError if overrides have changed what the weights compute."""
    changeable = {name: getattr(experiment.model, name) for name in RUNTIME_FIELDS}
    expected = dataclasses.replace(
        experiment,
        model=dataclasses.replace(imported.config, **changeable),
        position=imported.position,
    )
    changes = [
        f"config.{key} = {given!r}, but the weights are of {own!r}"
        for key, own, given in differing_values(flat_values(expected), flat_values(experiment))
    ]
    if changes:
        raise ConfigError(
            f"{'; '.join(changes)}; an import can change "
            f"{', '.join(f'model.{field}' for field in RUNTIME_FIELDS)} only"
        )


def is_tokenizer_compatible(imported: Experiment) -> bool:
    """Whether the tokenizer can be read and the embedding has a row for each of its tokens."""
    try:
        return _vocab_size(imported.data) <= imported.model.vocab_size
    except ConfigError:
        return False


def check_tokenizer(imported: Experiment, name: str | None = None) -> None:
    """Raises ConfigError for a tokenizer that is missing, broken or larger than the embedding.

    ``name`` stands for it in the last of these messages; None takes ``data.tokenizer``.
    """
    path = as_path(imported.data.tokenizer)
    if path.suffix == ".json":
        content = detect_content(read_head(path))
        if content:
            raise ConfigError(
                f"data.tokenizer = {str(path)!r}: it is {content.kind}; {content.advice}"
            )
        if not path.is_file():
            raise ConfigError(f"data.tokenizer = {str(path)!r}: there is no such file")
    size = _vocab_size(imported.data)
    if size > imported.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {name or imported.data.tokenizer} has {size:,} tokens, the embedding "
            f"of {imported.name} has {imported.model.vocab_size:,}, and an import does not change "
            "it: name the tokenizer that the model was trained with, "
            f"--config.data.tokenizer=PATH/{TOKENIZER}, or make the embedding larger before "
            f"(resize_token_embeddings({size}) of transformers, then save_pretrained)"
        )


def _vocab_size(data: DataConfig) -> int:
    """The tokenizer's largest id plus one; ConfigError if the library cannot read its file."""
    if data.tokenizer == "bytes":
        return BytesTokenizer.vocab_size
    if data.tokenizer == "sentencepiece":
        return data.vocab_size
    tokenizers: Any = require("tokenizers", "train")
    try:
        content = as_path(data.tokenizer).read_bytes().decode("utf-8-sig")
        stored = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises this for an invalid file
        raise ConfigError(
            f"data.tokenizer = {data.tokenizer!r} cannot be read: {error}; get the file again, or "
            f"name a whole one, --config.data.tokenizer=PATH/{TOKENIZER}"
        ) from error
    return max(stored.get_vocab(with_added_tokens=True).values(), default=-1) + 1
