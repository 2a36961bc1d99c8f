"""Loads the trained model of a run from its directory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from fope_jax.config import ConfigError, Experiment, build_experiment
from fope_jax.evaluate.fingerprint import check_fingerprint
from fope_jax.model.backends import FUSED_BACKENDS
from fope_jax.model.finite import count_non_finite, describe_non_finite
from fope_jax.model.sharding import tree_shardings
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.content import has_gguf_magic
from fope_jax.storage.files import read_json, read_json_or_empty
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import IMPORTED, LINEAGE, RUN, describe_weights, is_of_weights

log = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """Weights, activations or scores hold NaN or an infinity."""


class LoadedRun(NamedTuple):
    """A trained model after ``step`` updates, with the contents of config.json and run.json."""

    experiment: Experiment
    model: Transformer
    step: int
    run_info: dict[str, Any]


def read_experiment(workdir: Path) -> Experiment:
    """The experiment that a run's config.json describes.

    Raises:
      FileNotFoundError: not a run; the message says what the path is instead.
      ConfigError: config.json was not written by fope, or holds a value that is not accepted.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run: {_describe_other_path(workdir)}")
    values = read_json(path)
    if is_of_weights(values):
        raise ConfigError(
            f"{describe_weights(workdir)}, `fope extend hf:{workdir}` goes on from it"
        )
    try:
        return build_experiment(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _describe_other_path(path: Path) -> str:
    parent_is_run = (path.parent / "config.json").is_file()
    has_manifest = (path / "manifest.json").is_file()
    if str(path).startswith("hf:"):
        return f"it names weights; `fope import {path} --workdir RUN` makes a run of them"
    if has_gguf_magic(path):
        return f"it is a GGUF file; `fope import {path} --workdir RUN` makes a run of it"
    if path.exists() and not path.is_dir():
        return "it is a file; name the directory of the run, the --workdir of `fope train`"
    if path.exists() and parent_is_run and path.name.isdecimal():
        return f"it is named like a step of {path.parent}; give that run and its step by itself"
    if path.exists() and parent_is_run:
        return f"it is inside {path.parent}; name that directory if it is the run"
    if has_manifest and path.name.isdecimal():
        return f"it is a checkpoint of {path.parent.parent}; give that run and its step by itself"
    if has_manifest:
        return "it is a token cache; name the directory of the run, the --workdir of `fope train`"
    what = "there is no config.json" if path.exists() else "there is no such directory"
    return f"{what}; make one with `fope train --config CONFIG --workdir {path}`"


def warn_where_bos_is_unknown(workdir: str | Path) -> None:
    """Warns of imported weights whose config.json does not say if they were trained with BOS."""
    workdir = as_path(workdir)
    info = workdir / "run.json"
    if not (info.is_file() and "kept" in read_json(info)):  # only imported runs have this key
        return
    if "add_bos_token" not in read_json(workdir / "config.json").get("evaluate", {}):
        log.warning(
            "%s: its weights were imported by an older version, which did not keep whether they "
            "were trained with a token for the beginning of a sequence; none is added. Where they "
            "were: --config.evaluate.bos_token=TOKEN --config.evaluate.add_bos_token=true, or "
            "import them again",
            workdir,
        )


def find_step(workdir: Path, store: CheckpointStore, step: int | None) -> int:
    """``step``, or the newest valid step where it is None."""
    step = store.latest_valid_step() if step is None else step
    if step is None:
        raise FileNotFoundError(f"{workdir} has no valid checkpoint; {_how_to_make(workdir)}")
    return step


def _how_to_make(workdir: Path) -> str:
    """The command that makes or finishes a run, by the files of one that was cut off."""
    info = read_json_or_empty(workdir / RUN)
    if IMPORTED in info:
        source = info[IMPORTED].get("directory", "SOURCE")
        return f"import it again with `fope import {source} --workdir {workdir}`"
    if (workdir / LINEAGE).is_file():
        return f"make it with the same `fope extend PARENT .. --workdir {workdir}` again"
    return f"train it with `fope train --config CONFIG --workdir {workdir}`"


def load_run(
    workdir: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    accept_position: str | None = None,
) -> LoadedRun:
    """Loads the model of a run: directory with config.json, run.json and checkpoints.

    Defaults: the newest valid ``step``, and arrays on the first device. With ``mesh`` they are
    sharded over it. For ``accept_position`` see ``check_fingerprint``.

    Raises:
      FileNotFoundError: no config.json, or no valid checkpoint.
      CheckpointError: arrays do not fit the model, or the position fingerprint differs.
      ValueError: the model cannot be sharded over the mesh.
    """
    workdir = as_path(workdir)
    experiment = read_experiment(workdir)
    with contextlib.closing(CheckpointStore(workdir / "checkpoints")) as store:
        step = find_step(workdir, store, step)
        metadata, where = store.metadata(step), f"{workdir}, step {step}"
        position, shape = experiment.position, experiment.model.shape
        # First without arrays: their shapes depend on the position embedding.
        check_fingerprint(metadata, position, shape, None, where, accept_position)
        graphdef, params, constants = _abstract_model(experiment)
        arrays = {"params": params, "constants": constants}
        if mesh is not None:
            arrays = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                arrays,
                {name: tree_shardings(tree, position, mesh) for name, tree in arrays.items()},
            )
        arrays = store.restore(step, arrays)
    model = merge(graphdef, arrays["params"], arrays["constants"])
    check_fingerprint(metadata, position, shape, split(model)[2], where, accept_position)
    return LoadedRun(experiment, model, step, read_json_or_empty(workdir / RUN))


def evaluation_graphdef(experiment: Experiment) -> nnx.GraphDef:
    """The model of ``experiment`` without its arrays, with the attention backend of evaluation."""
    return _abstract_model(experiment)[0]


def _abstract_model(experiment: Experiment) -> tuple[nnx.GraphDef, Any, Any]:
    config = experiment.model
    if config.attention in FUSED_BACKENDS:  # they may not support this platform and these lengths
        config = dataclasses.replace(config, attention="auto")
    return split(nnx.eval_shape(lambda: Transformer(config, experiment.position, rngs=nnx.Rngs(0))))


def check_weights(model: Transformer, where: str) -> None:
    """Raises NonFiniteError, with their names, where arrays of a model are not finite."""
    _, params, constants = split(model)
    if counts := count_non_finite(params) | count_non_finite(constants):
        raise NonFiniteError(
            f"{where}: weights that are not finite: {describe_non_finite(counts)}; no score of "
            "such a model means anything, and none was written. Name another checkpoint with "
            "--step, or bring weights in that are finite"
        )
