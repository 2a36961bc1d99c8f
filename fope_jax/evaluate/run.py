"""Every protocol for one checkpoint: `fope evaluate`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from fope_jax.checkpoint import CheckpointStore
from fope_jax.config import Experiment, build_experiment, check_vocabulary
from fope_jax.data.cache import open_cache
from fope_jax.evaluate.identity import check_fingerprint
from fope_jax.evaluate.metrics import METRICS, Row, read_rows, replace_rows
from fope_jax.evaluate.perplexity import Progress, score_positions, score_same_tokens
from fope_jax.evaluate.retrieval import TEMPLATES, check_contexts, draw_keys, score_passkey
from fope_jax.evaluate.scoring import Scorer, model_scorer
from fope_jax.evaluate.windows import Windows
from fope_jax.extras import require
from fope_jax.files import as_path, read_json
from fope_jax.model.backends import FUSED
from fope_jax.model.sharding import MeshConfig, make_mesh, tree_shardings
from fope_jax.model.transformer import Transformer, merge, split
from fope_jax.processes import is_first, wait_for_all

PASSKEY_SEED = 0  # one seed for all runs: every variant is asked for the same keys
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
    """The experiment that a run's config.json describes."""
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} is no run: there is no {path.name}; make one with "
            f"`fope train --config CONFIG --workdir {workdir}`"
        )
    return build_experiment(read_json(path))


def find_step(workdir: Path, store: CheckpointStore, step: int | None) -> int:
    """``step``, or the newest valid one where it is None."""
    found = store.latest_valid_step() if step is None else step
    if found is None:
        raise FileNotFoundError(
            f"{workdir} has no valid checkpoint; train it with "
            f"`fope train --config CONFIG --workdir {workdir}`"
        )
    return found


def load_run(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> LoadedRun:
    """Rebuilds the model of a run from its directory alone.

    Args:
      workdir: directory with config.json, run.json and checkpoints.
      step: which checkpoint; None takes the newest valid one.
      mesh: devices that its arrays are laid out over; None puts all on the first one.

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
        check_fingerprint(metadata, position, shape, None, where)
        model = restore_model(experiment, store, step, mesh)
    finally:
        store.close()
    check_fingerprint(metadata, position, shape, split(model)[2], where)
    info = workdir / "run.json"
    run_info = read_json(info) if info.is_file() else {}
    return LoadedRun(experiment, model, step, run_info)


def restore_model(
    experiment: Experiment, store: CheckpointStore, step: int, mesh: Mesh | None = None
) -> Transformer:
    """The model of ``experiment`` with the arrays of one checkpoint; none are drawn first."""
    config = experiment.model
    if config.attention in FUSED:  # the platform and lengths of training
        config = dataclasses.replace(config, attention="auto")
    model = nnx.eval_shape(lambda: Transformer(config, experiment.position, rngs=nnx.Rngs(0)))
    graphdef, params, constants = split(model)
    items = {"params": params, "constants": constants}
    if mesh is not None:
        items = {name: _laid_out(tree, experiment, mesh) for name, tree in items.items()}
    restored = store.restore(step, items)
    return merge(graphdef, restored["params"], restored["constants"])


def _laid_out(tree: Any, experiment: Experiment, mesh: Mesh) -> Any:
    """Shapes of ``tree`` with the place of each leaf on ``mesh``."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        tree_shardings(tree, experiment.position, mesh),
    )


# ---------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Protocol:
    """One thing to measure.

    Attributes:
      kind: of its rows.
      identity: fields that all its rows share and no other protocol's of that kind.
      settings: everything else that its numbers depend on, JSON values.
      run: scorer -> (rows, where its windows are or None).
    """

    kind: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    run: Callable[[Scorer, Progress], tuple[list[Row], Windows | None]]

    @property
    def label(self) -> str:
        """For people: ``same-tokens (validation)``."""
        name, detail = self.identity.values()
        return f"{name} ({detail})"

    def owns(self, row: Row, step: int) -> bool:
        """Whether ``row`` is one of this protocol's at ``step``."""
        return (
            row.get("kind") in (self.kind, "protocol")
            and row.get("step") == step
            and all(row.get(key) == value for key, value in self.identity.items())
        )


def plan(experiment: Experiment, data_fingerprint: str | None) -> list[Protocol]:
    """The protocols that an experiment's ``evaluate`` section asks for, checked before any work.

    Args:
      experiment: of the run.
      data_fingerprint: of the token cache that the model was trained on; None for imported
        weights, which were trained elsewhere.

    Raises:
      ValueError: a length beyond what the position embedding is defined for, or too short for a
        passkey template, or a token cache that is not the one of training.
    """
    settings, length = experiment.evaluate, experiment.train.length
    contexts = sorted({length * multiple for multiple in settings.lengths})
    passkey_contexts = sorted({length * multiple for multiple in settings.passkey_lengths})
    limit = experiment.position.max_length()
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
    protocols = []
    for split_name in settings.splits:
        cache = caches[split_name]
        if contexts and settings.num_windows:
            protocols.append(_same_tokens(experiment, cache, split_name, contexts))
        if contexts and settings.position_windows:
            protocols.append(_long_window(experiment, cache, split_name, max(contexts)))
    if passkey_contexts and settings.passkey_trials and settings.passkey_depths:
        for name in settings.passkey_templates:
            protocols.append(_passkey(experiment, tokenizer, name, passkey_contexts))
    return protocols


def _same_tokens(experiment: Experiment, cache: Any, split: str, contexts: list[int]) -> Protocol:
    settings = {
        "contexts": contexts,
        "scored": experiment.evaluate.scored_tokens,
        "num_windows": experiment.evaluate.num_windows,
    }
    identity = {"protocol": "same-tokens", "split": split}
    return _on_corpus("perplexity", identity, settings, score_same_tokens, experiment, cache)


def _long_window(experiment: Experiment, cache: Any, split: str, context: int) -> Protocol:
    settings = {
        "context": context,
        "training_length": experiment.train.length,
        "num_windows": experiment.evaluate.position_windows,
    }
    identity = {"protocol": "long-window", "split": split}
    return _on_corpus("position", identity, settings, score_positions, experiment, cache)


def _on_corpus(
    kind: str,
    identity: dict[str, str],
    settings: dict[str, Any],
    score: Callable[..., tuple[list[Row], Windows]],
    experiment: Experiment,
    cache: Any,
) -> Protocol:
    """A protocol that scores windows of ``cache`` with ``score``, under ``settings``."""

    def run(scorer: Scorer, progress: Progress) -> tuple[list[Row], Windows]:
        batch_tokens = experiment.evaluate.batch_tokens
        return score(scorer, cache, **settings, batch_tokens=batch_tokens, progress=progress)

    return Protocol(kind, identity, settings | {"cache": cache.fingerprint}, run)


def _passkey(experiment: Experiment, tokenizer: Any, name: str, contexts: list[int]) -> Protocol:
    if name not in TEMPLATES:
        raise ValueError(
            f"evaluate.passkey_templates names {name!r}; accepted: {', '.join(TEMPLATES)}"
        )
    template = TEMPLATES[name]
    settings = {
        "contexts": contexts,
        "depths": list(experiment.evaluate.passkey_depths),
        "trials": experiment.evaluate.passkey_trials,
        "seed": PASSKEY_SEED,
    }
    keys = draw_keys(len(settings["depths"]), settings["trials"], PASSKEY_SEED)
    check_contexts(template, tokenizer, contexts, keys)

    def run(scorer: Scorer, progress: Progress) -> tuple[list[Row], None]:
        batch_tokens = experiment.evaluate.batch_tokens
        rows = score_passkey(
            scorer, tokenizer, template, **settings, batch_tokens=batch_tokens, progress=progress
        )
        return rows, None

    identity = {"protocol": "passkey", "template": name}
    texts = dataclasses.asdict(template)
    stated = settings | {"texts": texts, "tokenizer": tokenizer.fingerprint}
    return Protocol("passkey", identity, stated, run)


# ---------------------------------------------------------------------------- running them


def evaluate(
    workdir: str | Path,
    step: int | None = None,
    *,
    mesh: MeshConfig | None = None,
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Runs every protocol on one checkpoint and writes its rows to metrics.jsonl.

    A protocol whose rows for this step and these settings exist is left as it is. Each is written
    as soon as it is done, in place of its earlier rows of this step, so an interrupted evaluation
    goes on where it stopped.

    Args:
      workdir: a run.
      step: which checkpoint; None takes the newest valid one.
      mesh: how several devices share the work, which need not be how they shared training; None
        gives each its own windows (``MeshConfig()``).
      force: scores again what is there already.
      progress: called as ``progress(batches, desc=...)``; None shows tqdm bars.
      say: where one line for each protocol goes.

    Returns:
      The rows of all protocols at this step, as they stand in the file, time rows left out.
    """
    workdir = as_path(workdir)
    progress = progress or _bars
    if not is_first():
        say = _nothing
    experiment = read_experiment(workdir)
    store = CheckpointStore(workdir / "checkpoints")
    try:
        step = find_step(workdir, store, step)
        protocols = plan(experiment, store.metadata(step)["data"])
    finally:
        store.close()
    path = workdir / METRICS
    rows = read_rows(path)
    missing = [p for p in protocols if force or not _is_done(p, rows, step)]
    for protocol in protocols:
        if protocol not in missing:
            say(
                f"{protocol.label}: rows for step {step} exist in {path}; kept (force scores again)"
            )
    if missing:
        started = time.perf_counter()
        devices = _make_mesh(mesh)
        loaded = load_run(workdir, step, devices)
        scorer = model_scorer(loaded.model, devices)
        _write_time(path, "restore", step, time.perf_counter() - started)
        for protocol in missing:
            _run_one(protocol, scorer, experiment, step, path, progress, say)
        wait_for_all("evaluated")
    return [row for row in read_rows(path) if any(p.owns(row, step) for p in protocols)]


def _make_mesh(config: MeshConfig | None) -> Mesh | None:
    """The mesh of all devices; None where there is one and nothing is asked for."""
    if config is None and len(jax.devices()) == 1:
        return None
    return make_mesh(config or MeshConfig())


def _run_one(
    protocol: Protocol,
    scorer: Scorer,
    experiment: Experiment,
    step: int,
    path: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    started = time.perf_counter()
    scored, windows = protocol.run(scorer, progress)
    seconds = time.perf_counter() - started
    ids = {
        "variant": experiment.name,
        "seed": experiment.seed,
        "step": step,
        "training_length": experiment.train.length,
    }
    stated = {"kind": "protocol", **protocol.identity, **ids, "settings": protocol.settings}
    message = f"{protocol.label}: scored in {seconds:.1f} s"
    if windows is not None:
        stated["windows"] = len(windows.stop)
        stated["too_short"] = len(windows.too_short)
        stated["too_short_names"] = list(windows.too_short[:NAMES_SHOWN])
        message += f", {len(windows.stop)} windows"
        if windows.too_short:
            message += f"; documents too short for them: {len(windows.too_short)}"
    rows = [{"kind": protocol.kind, **protocol.identity, **ids, **row} for row in scored]
    if is_first():
        replace_rows(path, lambda row: protocol.owns(row, step), [*rows, stated])
    _write_time(path, f"evaluate {protocol.label}", step, seconds)
    say(message)


def _is_done(protocol: Protocol, rows: Iterable[Row], step: int) -> bool:
    return any(
        row["kind"] == "protocol"
        and protocol.owns(row, step)
        and row.get("settings") == protocol.settings
        for row in rows
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


def _bars(batches: Iterable[int], desc: str) -> Iterable[int]:
    tqdm = require("tqdm", "train").tqdm
    return tqdm(batches, desc=desc, unit="batch", dynamic_ncols=True, disable=not is_first())


def _nothing(_: str) -> None:
    """Where the lines of the other processes go: the first says what all do."""
