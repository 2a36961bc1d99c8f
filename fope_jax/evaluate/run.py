"""Every protocol for one checkpoint: `fope evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fope_jax.config import (
    ConfigError,
    Experiment,
    build_experiment,
    check_vocabulary,
    experiment_to_dict,
    overridden,
    split_override,
)
from fope_jax.data.bos import Bos, find_bos
from fope_jax.data.cache import open_cache
from fope_jax.data.held_out import read_held_out
from fope_jax.evaluate.alike import check_alike
from fope_jax.evaluate.answering import Answerer, model_answerer
from fope_jax.evaluate.asking import PASSKEY, RETRIEVAL, retrieval_protocols
from fope_jax.evaluate.finite import check_rows, check_weights, non_finite_rows
from fope_jax.evaluate.identity import check_fingerprint
from fope_jax.evaluate.metrics import METRICS, Row, read_rows, replace_rows
from fope_jax.evaluate.perplexity import Progress
from fope_jax.evaluate.protocol import Protocol
from fope_jax.evaluate.scoring import Scorer, model_scorer
from fope_jax.evaluate.text import TEXT_PROTOCOLS, text_protocol
from fope_jax.extras import require
from fope_jax.model.backends import FUSED
from fope_jax.model.sharding import MeshConfig, make_mesh, tree_shardings
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.processes.collectives import all_asked_to_stop, is_first, wait_for_all
from fope_jax.processes.initialize import in_all_processes
from fope_jax.processes.signals import Stopped, has_joined
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.files import as_path, read_json
from fope_jax.storage.lock import writing

logger = logging.getLogger(__name__)

NAMES_SHOWN = 20  # documents too short that a row names; its count is of all


# ---------------------------------------------------------------------------- loading a run


class LoadedRun(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
      experiment: rebuilt from config.json.
      model: with the parameters and constants of the checkpoint.
      step: optimizer updates done.
      run_info: run.json as a dict.
    """

    experiment: Experiment
    model: Transformer
    step: int
    run_info: dict[str, Any]


def read_experiment(workdir: Path) -> Experiment:
    """The experiment that a run's config.json describes.

    Raises:
      FileNotFoundError: there is no run; the message says what is there instead.
      ConfigError: config.json is not one of ours, or describes what cannot be.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run: {_instead(workdir)}")
    values = read_json(path)
    if "model_type" in values:
        raise ConfigError(
            f"{workdir} is no run but a checkpoint of Hugging Face; "
            f"`fope import --from {workdir} --workdir RUN` makes a run of it"
        )
    try:
        return build_experiment(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _instead(path: Path) -> str:
    """What a directory is that has no config.json, and what to do."""
    if not path.exists():
        what = "there is no such directory"
    elif not path.is_dir():
        return "it is a file; name the directory of the run, the --workdir of `fope train`"
    elif path.name.isdecimal() and (path.parent / "config.json").is_file():
        return f"it is named like a step of {path.parent}; give that run and its step by itself"
    elif (path.parent / "config.json").is_file():
        return f"it is inside {path.parent}; name that directory if it is the run"
    elif path.name.isdecimal() and (path / "manifest.json").is_file():
        return f"it is a checkpoint of {path.parent.parent}; give that run and its step by itself"
    elif (path / "manifest.json").is_file():
        return "it is a token cache; name the directory of the run, the --workdir of `fope train`"
    else:
        what = "there is no config.json"
    return f"{what}; make one with `fope train --config CONFIG --workdir {path}`"


def warn_where_bos_is_unknown(workdir: str | Path) -> None:
    """Warns of weights imported before it was kept whether they were trained with a BOS token."""
    workdir = as_path(workdir)
    info = workdir / "run.json"
    if not (info.is_file() and "kept" in read_json(info)):  # the key of imported weights
        return
    if "add_bos_token" not in read_json(workdir / "config.json").get("evaluate", {}):
        logger.warning(
            "%s: its weights were imported by an older version, which did not keep whether they "
            "were trained with a token for the beginning of a sequence; none is added. Where they "
            "were: --config.evaluate.bos_token=TOKEN --config.evaluate.add_bos_token=true, or "
            "import them again",
            workdir,
        )


def find_step(workdir: Path, store: CheckpointStore, step: int | None) -> int:
    """``step``, or the newest valid one where it is None."""
    found = store.latest_valid_step() if step is None else step
    if found is None:
        raise FileNotFoundError(
            f"{workdir} has no valid checkpoint; train it with "
            f"`fope train --config CONFIG --workdir {workdir}`"
        )
    return found


def load_run(
    workdir: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    accept_position: str | None = None,
) -> LoadedRun:
    """Rebuilds the model of a run from its directory alone.

    Args:
      workdir: directory with config.json, run.json and checkpoints.
      step: which checkpoint; None takes the newest valid one.
      mesh: devices that its arrays are laid out over; None puts all on the first one.
      accept_position: see ``check_fingerprint``.

    Raises:
      FileNotFoundError: no config.json, or no valid checkpoint.
      CheckpointError: arrays that do not fit the model that config.json describes, or the
        checkpoint's position fingerprint is not that of the restored model.
      ValueError: the model cannot be cut over the mesh.
    """
    workdir = as_path(workdir)
    experiment = read_experiment(workdir)
    store = CheckpointStore(workdir / "checkpoints")
    try:
        step = find_step(workdir, store, step)
        metadata, where = store.metadata(step), f"{workdir}, step {step}"
        position, shape = experiment.position, experiment.model.shape
        check_fingerprint(metadata, position, shape, None, where, accept_position)
        model = restore_model(experiment, store, step, mesh)
    finally:
        store.close()
    check_fingerprint(metadata, position, shape, split(model)[2], where, accept_position)
    info = workdir / "run.json"
    run_info = read_json(info) if info.is_file() else {}
    return LoadedRun(experiment, model, step, run_info)


def restore_model(
    experiment: Experiment, store: CheckpointStore, step: int, mesh: Mesh | None = None
) -> Transformer:
    """The model of ``experiment`` with the arrays of one checkpoint; none are drawn first."""
    graphdef, params, constants = _described(experiment)
    items = {"params": params, "constants": constants}
    if mesh is not None:
        items = {name: _laid_out(tree, experiment, mesh) for name, tree in items.items()}
    restored = store.restore(step, items)
    return merge(graphdef, restored["params"], restored["constants"])


def evaluation_graphdef(experiment: Experiment) -> nnx.GraphDef:
    """The model of ``experiment`` without its arrays, as evaluation runs it."""
    return _described(experiment)[0]


def _described(experiment: Experiment) -> tuple[nnx.GraphDef, Any, Any]:
    config = experiment.model
    if config.attention in FUSED:  # the platform and lengths of training
        config = dataclasses.replace(config, attention="auto")
    return split(nnx.eval_shape(lambda: Transformer(config, experiment.position, rngs=nnx.Rngs(0))))


def _laid_out(tree: Any, experiment: Experiment, mesh: Mesh) -> Any:
    """Shapes of ``tree`` with the place of each leaf on ``mesh``."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        tree_shardings(tree, experiment.position, mesh),
    )


# ---------------------------------------------------------------------------- protocols


PROTOCOLS = (*TEXT_PROTOCOLS, PASSKEY, RETRIEVAL)


def protocol_names(wanted: Sequence[str]) -> tuple[str, ...]:
    """The names in ``wanted``, each once and in the order of ``PROTOCOLS``; "all" stands for all.

    >>> protocol_names(("passkey", "chunks"))
    ('chunks', 'passkey')

    Raises:
      ValueError: a name that is none.
    """
    for name in wanted:
        if name not in (*PROTOCOLS, "all"):
            raise ValueError(
                f"{name!r} is no protocol; accepted: {', '.join(PROTOCOLS)}, or all of them: all"
            )
    return PROTOCOLS if "all" in wanted else tuple(p for p in PROTOCOLS if p in wanted)


def plan(
    experiment: Experiment, data_fingerprint: str | None, wanted: Sequence[str] | None = None
) -> list[Protocol]:
    """The protocols that an experiment's ``evaluate`` section asks for, checked before any work.

    Args:
      experiment: of the run.
      data_fingerprint: of the token cache that the model was trained on; None for imported
        weights, which were trained elsewhere.
      wanted: names of ``PROTOCOLS`` or "all", in place of ``evaluate.protocols``. What cannot run
        is an error where it is named, and a warning where it is one of "all".

    Raises:
      ValueError: an unknown protocol, a length beyond what the position embedding is defined for,
        or too short for a protocol, or a token cache that is not the one of training.
    """
    settings, length = experiment.evaluate, experiment.train.length
    asked = settings.protocols if wanted is None else wanted
    names = protocol_names(asked)
    on_text = [name for name in names if name in TEXT_PROTOCOLS]
    lengths = settings.lengths if on_text else ()
    answered = {PASSKEY, RETRIEVAL} & set(names)
    passkey_lengths = settings.passkey_lengths if answered else ()
    contexts = sorted({length * multiple for multiple in lengths})
    passkey_contexts = sorted({length * multiple for multiple in passkey_lengths})
    limit = experiment.position.limits.max_length
    longest = max([*contexts, *passkey_contexts], default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"evaluate.lengths and passkey_lengths reach {longest} tokens, but "
            f"{type(experiment.position).__name__} is defined for at most {limit}; evaluate "
            f"multiples of train.length = {length} up to {limit // length}"
        )
    caches = {name: open_cache(experiment.data, name) for name in settings.splits or ("train",)}
    cache = next(iter(caches.values()))
    if data_fingerprint is not None and cache.fingerprint != data_fingerprint:
        raise ValueError(
            f"the model was trained on a token cache with fingerprint {data_fingerprint}, but the "
            f"one in {experiment.data.cache_dir} has {cache.fingerprint}: its corpus or tokenizer "
            "has changed, and its tokens mean something else to the model"
        )
    tokenizer = cache.tokenizer
    check_vocabulary(tokenizer.vocab_size, experiment.model)
    bos = find_bos(tokenizer, settings.bos_token) if settings.add_bos_token else None
    texts = [read_held_out(source, tokenizer, experiment.data) for source in settings.texts]
    scored = {name: caches[name] for name in settings.splits}
    protocols = [
        protocol
        for split_name, own in (scored | {text.split: text for text in texts}).items()
        for name in (on_text if contexts else ())
        for protocol in _on_text(name, experiment, own, split_name, contexts, asked, bos)
    ]
    return protocols + retrieval_protocols(experiment, cache, passkey_contexts, names, asked, bos)


def _on_text(
    name: str,
    experiment: Experiment,
    cache: Any,
    split: str,
    contexts: list[int],
    asked: Sequence[str],
    bos: Bos | None,
) -> list[Protocol]:
    """The protocol ``name``; none where it has no windows, or cannot run and is one of "all"."""
    try:
        protocol = text_protocol(name, experiment, cache, split, contexts, bos)
    except ValueError as error:
        if name in asked:
            raise
        logger.warning("%s (%s) is left out: %s", name, split, error)
        return []
    # A configuration may leave a protocol out by having none of its windows; a caller may not.
    if protocol is None and name in asked and asked is not experiment.evaluate.protocols:
        raise ValueError(
            f"protocol {name} is asked for, but this run's configuration has "
            "evaluate.num_windows or evaluate.position_windows = 0, none of its windows"
        )
    return [] if protocol is None else [protocol]


# ---------------------------------------------------------------------------- running them


def _alone(function: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
    """``function`` of a run, which it holds against other writers meanwhile."""

    @functools.wraps(function)
    def alone(workdir: str | Path, *arguments: Any, **named: Any) -> list[Row]:
        workdir = as_path(workdir)
        with in_all_processes():
            read_experiment(workdir)  # or the lock would make a directory of a name that is wrong
        with writing(workdir, "evaluate"):
            return function(workdir, *arguments, **named)

    return alone


@_alone
def evaluate(
    workdir: str | Path,
    step: int | None = None,
    *,
    protocols: Sequence[str] | None = None,
    mesh: MeshConfig | None = None,
    force: bool = False,
    accept_position: str | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Runs protocols on one checkpoint and writes their rows to metrics.jsonl.

    A protocol whose rows for this step and these settings exist is left as it is. Each is written
    as soon as it is done, in place of its earlier rows of this step, so an interrupted evaluation
    goes on where it stopped.

    Args:
      workdir: a run.
      step: which checkpoint; None takes the newest valid one.
      protocols: names of ``PROTOCOLS`` or "all", in place of the run's ``evaluate.protocols``.
      mesh: how several devices share the work, which need not be how they shared training; None
        gives each its own windows (``MeshConfig()``).
      force: scores again what is there already.
      accept_position: see ``check_fingerprint``.
      overrides: ``"evaluate.texts=news"``, values in place of those of the run's ``evaluate``
        section. What they change is in the rows; config.json stays as it is.
      progress: called as ``progress(batches, desc=...)``; None shows tqdm bars.
      say: where one line for each protocol goes.

    Returns:
      The rows of these protocols at this step, as they stand in the file, time rows left out.

    Raises:
      LockError: another process writes into the run.
      Stopped: one of several processes was asked to end; rows of whole protocols are kept.
      NonFiniteError: weights or scores are not finite; the message names arrays or documents.
      ValueError: an override that cannot be, or is of another section.
    """
    workdir = as_path(workdir)
    progress = _checking(progress or _bars)
    if not is_first():
        say = _nothing
    with in_all_processes():
        experiment = _with_overrides(read_experiment(workdir), overrides)
    if not any("evaluate.add_bos_token=" in override for override in overrides):
        warn_where_bos_is_unknown(workdir)
    asked = {
        "--step": step,
        "--protocols": protocols,
        "--mesh": str(mesh),
        "--force": force,
        "--accept-position": accept_position,
    }
    check_alike(experiment, asked, experiment.evaluate.splits)
    store = CheckpointStore(workdir / "checkpoints")
    try:
        step = find_step(workdir, store, step)
        with in_all_processes():
            planned = plan(experiment, store.metadata(step)["data"], protocols)
    finally:
        store.close()
    path = workdir / METRICS
    rows = read_rows(path)
    missing = [p for p in planned if force or not _is_done(p, rows, step)]
    for protocol in planned:
        if protocol not in missing:
            say(
                f"{protocol.label}: rows for step {step} exist in {path}; kept (force scores again)"
            )
    if missing:
        started = time.perf_counter()
        devices = _make_mesh(mesh)
        loaded = load_run(workdir, step, devices, accept_position)
        check_weights(loaded.model, f"{workdir}, step {step}")
        scorer = model_scorer(loaded.model, devices)
        answerer = model_answerer(loaded.model, devices)
        _write_time(path, "evaluate: restore", step, time.perf_counter() - started)
        for protocol in missing:
            reader = answerer if protocol.answers else scorer
            _run_one(protocol, reader, experiment, step, path, progress, say)
        wait_for_all("evaluated")
    return [row for row in read_rows(path) if any(p.owns(row, step) for p in planned)]


def _with_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """``experiment`` with other values in its ``evaluate`` section."""
    for override in overrides:
        key, text = split_override(override)
        if not key.startswith("evaluate."):
            raise ValueError(
                f"--config.{key}={text}: a trained run keeps its configuration; accepted: "
                "values of its evaluate section, such as --config.evaluate.texts=news"
            )
    if not overrides:
        return experiment
    return build_experiment(overridden(ConfigDict(experiment_to_dict(experiment)), overrides))


def _make_mesh(config: MeshConfig | None) -> Mesh | None:
    """The mesh of all devices; None where there is one and nothing is asked for."""
    if config is None and len(jax.devices()) == 1:
        return None
    return make_mesh(config or MeshConfig())


def _run_one(
    protocol: Protocol,
    reader: Scorer | Answerer,
    experiment: Experiment,
    step: int,
    path: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    started = time.perf_counter()
    scored, windows = protocol.run(reader, progress)
    seconds = time.perf_counter() - started
    ids = {
        "variant": experiment.name,
        "seed": experiment.seed,
        "step": step,
        "training_length": experiment.train.length,
    }
    stated = {"kind": "protocol", **protocol.row_fields, **ids, "settings": protocol.settings}
    stated["bos"] = protocol.bos
    message = f"{protocol.label}: scored in {seconds:.1f} s"
    if protocol.bos_token:
        message += f", {protocol.bos}"
    if windows is not None:
        stated["windows"] = len(windows.stop)
        stated["too_short"] = len(windows.too_short)
        stated["too_short_names"] = list(windows.too_short[:NAMES_SHOWN])
        message += f", {len(windows.stop)} windows"
        if windows.too_short:
            message += f"; documents too short for them: {len(windows.too_short)}"
    rows = [{"kind": protocol.kind, **protocol.row_fields, **ids, **row} for row in scored]
    check_rows(rows, f"{path.parent}, step {step}: {protocol.label}", experiment.model.dtype)
    if is_first():
        replace_rows(path, lambda row: protocol.owns(row, step), [*rows, stated])
    _write_time(path, f"evaluate {protocol.label}", step, seconds)
    say(message)


def _is_done(protocol: Protocol, rows: Iterable[Row], step: int) -> bool:
    own = [row for row in rows if protocol.owns(row, step)]
    # Earlier versions wrote rows of NaN, with every target counted as a hit.
    return not non_finite_rows(own) and any(
        row["kind"] == "protocol" and row.get("settings") == protocol.settings for row in own
    )


def _write_time(path: Path, phase: str, step: int, seconds: float) -> None:
    if not is_first():
        return
    row = {"kind": "time", "phase": phase, "step": step, "seconds": round(seconds, 3)}
    replace_rows(
        path,
        lambda old: (old.get("kind"), old.get("phase"), old.get("step")) == ("time", phase, step),
        [row],
    )


def _checking(progress: Progress) -> Progress:
    """``progress`` that ends where several processes are asked to: all of them after one batch.

    In a single process a signal needs no looking for, see ``fope_jax.processes.signals``.
    """

    def checking(batches: Iterable[int], **named: Any) -> Iterable[int]:
        for batch in progress(batches, **named):
            if has_joined() and all_asked_to_stop():
                raise Stopped(signal.SIGTERM, in_all_processes=True)
            yield batch

    return checking


def _bars(batches: Iterable[int], desc: str) -> Iterable[int]:
    tqdm = require("tqdm", "train").tqdm
    return tqdm(batches, desc=desc, unit="batch", dynamic_ncols=True, disable=not is_first())


def _nothing(_: str) -> None:
    """Where the lines of the other processes go: the first says what all do."""
