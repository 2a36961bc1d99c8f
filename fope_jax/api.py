"""The Python API: train, load, evaluate and extend runs from a script or a notebook.

    import fope_jax as fj

    run = fj.train("configs/recall.py:position=fope", "runs/fope", train_steps=500)
    run.generate([5, 17, 42], max_new_tokens=4)
    table = fj.evaluate(run, contexts=[1, 2, 4])
    longer = fj.extend(run, method="yarn", length=128, workdir="runs/yarn")
    fj.report([run, longer], "runs/report")

Functions do what the verbs of `fope` do, on the same files, and raise the same errors. They print
nothing, unless ``verbose=True``; messages go to the logger ``fope_jax``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fope_jax import position as positions
from fope_jax.config import ConfigError, Experiment, build_experiment
from fope_jax.config.from_python import Config, config_of, evaluate_overrides, overrides_of
from fope_jax.data.build import build
from fope_jax.data.manifest import MissingCacheError
from fope_jax.evaluate import run as evaluation
from fope_jax.evaluate.downstream.plan import TaskRequest
from fope_jax.evaluate.restore import evaluation_graphdef, find_step, load_run, read_experiment
from fope_jax.evaluate.run_data import load_run_tokenizer
from fope_jax.evaluate.variants import AS, Variant, variant_experiment
from fope_jax.extend import run as extension
from fope_jax.extend.variants import make_variants
from fope_jax.interop.hub import PREFIX, local_checkpoint
from fope_jax.interop.run_import import import_run, imported_experiment
from fope_jax.interop.weights import import_config, import_weights
from fope_jax.logs import log_to_stderr, quiet
from fope_jax.model.transformer import Transformer, merge
from fope_jax.position import PositionEmbedding
from fope_jax.processes.signals import keep_process
from fope_jax.report.page import write_report
from fope_jax.report.rows import Row, read_run
from fope_jax.report.summary import summarize
from fope_jax.report.tasks import summarize_tasks
from fope_jax.run import Run, data_frame, workdir_of
from fope_jax.spectrum import run as spectra
from fope_jax.storage.checkpoint import CheckpointStore
from fope_jax.storage.files import read_json
from fope_jax.storage.paths import as_path
from fope_jax.storage.run_paths import CHECKPOINTS, CONFIG, is_of_weights, split_step
from fope_jax.train import loop
from fope_jax.train.options import OVERRIDE
from fope_jax.train.preemption import Preempted
from fope_jax.train.tracker import Tracker

if TYPE_CHECKING:
    from pandas import DataFrame

Source = str | Path

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------- verbs


def train(
    config: Config,
    workdir: Source,
    overrides: Mapping[str, Any] | None = None,
    *,
    position: str | Mapping[str, Any] | PositionEmbedding | None = None,
    accept_position: str | None = None,
    tracker: Tracker | None = None,
    verbose: bool = False,
    **values: Any,
) -> Run:
    """Trains a configuration in ``workdir``, as `fope train`, and returns the run.

    A run that was interrupted goes on from its newest checkpoint, a finished one is returned at
    once. A missing token cache is built first. Ctrl-C saves the step under way.

        fj.train("configs/recall.py:position=rope", "runs/rope", train_steps=500)
        fj.train("configs/recall.py", "runs/own", position=fj.position.RoPE(theta=500.0))

    Args:
      config: "FILE.py:ARGUMENT", a config.json, a ConfigDict, a dict, or an `Experiment`.
      workdir: directory of the run, also ``gs://BUCKET/PATH``.
      overrides: values by their keys, such as ``{"train.steps": 500}``.
      position: another position embedding: its name, ``{"method": NAME, KNOB: VALUE}``, or a
        method. A run named after its method is renamed with it.
      accept_position: hash of another position embedding whose checkpoints are taken.
      tracker: a callable ``(step, numbers)`` for an experiment tracker, see `train.tracker`, which
        takes the name of one.
      verbose: print messages and progress bars to stderr.
      **values: the same as ``overrides`` by section and field: ``train_steps=500``.

    Raises:
      ConfigError: a key is unknown (the message has the nearest) or a value not accepted, or the
        workdir holds another run.
      KeyboardInterrupt: Ctrl-C; the same call goes on from what was saved.
      CheckpointError, BadStepError, LockError, CacheError, CorpusError, OSError: as `fope train`.
    """
    experiment = build_experiment(config_of(config, position, overrides_of(overrides, values)))
    if tracker is not None and not callable(tracker):
        raise ConfigError(
            f"tracker = {tracker!r}; accepted: a callable, or train_tracker='MODULE:CLASS'"
        )
    with _session(verbose):
        run = partial(loop.train, experiment, workdir, accept_position, tracker=tracker)
        _with_token_cache(run, lambda: experiment)
    return load(workdir)


def load(
    source: Source,
    step: int | None = None,
    *,
    workdir: Source | None = None,
    verbose: bool = False,
    **values: Any,
) -> Run:
    """Opens a run or a Hugging Face checkpoint; weights are read when they are needed.

        fj.load("runs/fope"), fj.load("runs/fope/500"), fj.load("runs/fope", step=500)
        fj.load("models/SmolLM2-135M"), fj.load("hf:HuggingFaceTB/SmolLM2-135M")

    Args:
      source: directory of a run, of one of its checkpoints, or of a Hugging Face checkpoint;
        "hf:DIRECTORY" or "hf:ORG/NAME", taken from the Hub or its cache.
      step: of the checkpoint; None takes the newest valid one.
      workdir: of Hugging Face weights, a new directory to import them into, as `fope import`;
        `evaluate` needs one. The same call again opens it.
      **values: of the configuration of such a run, see `train`; ``train_length`` is the length that
        evaluation counts in multiples of.
      verbose: print messages and bars of downloads to stderr.

    Raises:
      FileNotFoundError: no run, or no valid checkpoint; says what there is.
      ValueError: no path or name, a results file, weights of an unsupported kind, or a step that
        does not exist.
    """
    if isinstance(source, Run):
        raise ValueError(f"source = {source}: it is open already; use it as it is")
    name = _path_text("source", source)
    if step is not None and (isinstance(step, bool) or not isinstance(step, (int, np.integer))):
        raise ValueError(f"step = {step!r}; accepted: a whole number, or None for the newest")
    step = None if step is None else int(step)
    if name.endswith(".jsonl"):
        raise ValueError(
            f"{name} is a results file: it has the rows of a run and not its weights. Name the "
            "run's directory, or give the file to fope_jax.report"
        )
    if name.startswith(PREFIX) or _has_weights(as_path(name)):
        if step is not None:
            raise ValueError(f"step = {step}: {name} is a Hugging Face checkpoint, without steps")
        overrides = overrides_of(None, values)
        with _session(verbose):
            return _load_weights(local_checkpoint(name, verbose), workdir, overrides)
    if workdir is not None or values:
        given = f"workdir = {str(workdir)!r}" if workdir is not None else ", ".join(values)
        raise ValueError(f"{given}: only Hugging Face weights are imported, and {name} is a run")
    directory, step = split_step(name, step)
    experiment = read_experiment(directory)
    with contextlib.closing(CheckpointStore(directory / CHECKPOINTS)) as store:
        step = find_step(directory, store, step)
        store.metadata(step)  # names the steps that exist
    return Run(
        experiment,
        step,
        directory,
        read_model=lambda: load_run(directory, step).model,
        read_tokenizer=lambda: load_run_tokenizer(directory, experiment.data),
    )


def evaluate(
    run: Run | Source | Sequence[Run | Source],
    protocols: str | Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    retrieval_tasks: Sequence[str] | None = None,
    *,
    positions: str | Sequence[str] = (),
    force: bool = False,
    verbose: bool = False,
    **values: Any,
) -> DataFrame:
    """Measures runs against context length, as `fope evaluate`.

    What has been measured with the same settings is read, not measured again; rows of other
    settings are replaced.

        fj.evaluate([rope, fope], protocols=["same-tokens"], contexts=[1, 2, 4])

    Args:
      run: a run or its directory, or several.
      protocols: "all" or some of `fope evaluate --help`; None takes the run's
        ``evaluate.protocols``.
      contexts: lengths in multiples of the training length, for text and for retrieval.
      retrieval_tasks: such as ``["recall", "copy"]``.
      positions: one or more other position embeddings to read the checkpoints with, without
        training, as `fope evaluate --as`: ``["same", "yarn:factor=4", "nope"]``.
      force: measure again what has been measured.
      verbose: print messages and progress bars to stderr.
      **values: other fields of the run's section evaluate, such as ``num_windows=64``, also with
        its name, ``evaluate_num_windows``; and ``data_cache_dir``, where a token cache was moved
        to.

    Returns:
      A data frame with a row for each run, protocol, text or task, and context. Its columns: ``run,
      method, seed, step, workdir`` and those of `fope_jax.report.summary.summarize`.

    Raises:
      ConfigError: an unknown field, or a value of another kind.
      FileNotFoundError: no run, or no valid checkpoint.
      NonFiniteError, LockError, ValueError: as `fope evaluate`.
    """
    runs = _listed(run)
    given = list(values.items())
    if contexts is not None:
        given += [("lengths", contexts), ("passkey_lengths", contexts)]
    if retrieval_tasks is not None:
        given.append(("retrieval_tasks", retrieval_tasks))
    overrides = evaluate_overrides(given, ("contexts", "protocols", "positions"))
    protocols = None if protocols is None else _texts("protocols", protocols, "same-tokens")
    evaluating = partial(evaluation.evaluate, protocols=protocols, force=force)
    return _evaluate_runs(runs, evaluating, overrides, positions, summarize, verbose)


def evaluate_tasks(
    run: Run | Source | Sequence[Run | Source],
    tasks: str | Sequence[str],
    *,
    positions: str | Sequence[str] = (),
    max_items: int | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 32,
    force: bool = False,
    verbose: bool = False,
    **values: Any,
) -> DataFrame:
    """Asks runs downstream tasks, as `fope evaluate --tasks`.

        fj.evaluate_tasks([rope, fope], "questions.jsonl")
        fj.evaluate_tasks("runs/smollm2", ["longbench=LongBench"], positions=["same", "drope"])

    Args:
      run: a run or its directory, or several.
      tasks: "longbench", "longbench=DIR", "ruler", "paper" or files of JSON lines.
      positions: as `evaluate`.
      max_items: the first items of each task; None takes all.
      max_length: most tokens of a prompt and its answer together; None for no limit.
      max_new_tokens: most tokens to write for an item of a file.
      force: ask again what has been asked.
      verbose: print messages and progress bars to stderr.
      **values: as `evaluate`.

    Returns:
      A data frame with a row for each run, task, range of length and metric. Its columns: ``run,
      method, seed, step, workdir`` and those of `fope_jax.report.tasks.summarize_tasks`.

    Raises:
      ConfigError, FileNotFoundError, LockError, NonFiniteError: as `evaluate`.
      ValueError: an unknown task, a file that is not as it should be, or a number below 1.
      ImportError: a task's library is missing.
    """
    runs = _listed(run)
    names = _texts("tasks", tasks, "questions.jsonl")
    request = TaskRequest(names, max_items, max_length, max_new_tokens)
    overrides = evaluate_overrides(values.items(), ("positions", *request._fields[1:]))
    evaluating = partial(evaluation.evaluate, tasks=request, force=force)
    return _evaluate_runs(runs, evaluating, overrides, positions, summarize_tasks, verbose)


def extend(
    run: Run | Source,
    method: str,
    length: int,
    workdir: Source,
    overrides: Mapping[str, Any] | None = None,
    *,
    config: Config | None = None,
    optimizer: str = "reset-moments",
    match: str = "frequency",
    allow_shorter: bool = False,
    no_train: bool = False,
    evaluate: bool = False,
    verbose: bool = False,
    **values: Any,
) -> Run:
    """Goes on from a run at a longer length, as `fope extend`; returns the new run.

        fj.extend(rope, method="yarn", length=256, workdir="runs/yarn", train_steps=100)
        fj.extend(rope, method="yarn", length=512, workdir="runs/yarn_512", no_train=True)

    Args:
      run: a run or its directory, or "hf:DIRECTORY" or "hf:ORG/NAME".
      method: "same", a position embedding, or a scaling such as "yarn" for a model with
        frequencies.
      length: tokens of a sequence.
      workdir: directory of the new run.
      overrides, **values: of the new run's configuration, see `train`.
      config: a whole configuration of the new run; without it values follow from the parent's.
      optimizer, match, allow_shorter: see `fope extend --help`.
      no_train: only change the position embedding; the weights are shared with the parent.
      evaluate: run the whole evaluation at the end.
      verbose: print messages and progress bars to stderr.

    Raises:
      ConfigError, ValueError: the method cannot go on from the run's; the message says why.
      FileNotFoundError: no run, or no valid checkpoint.
      KeyboardInterrupt: Ctrl-C; the same call goes on from what was saved.
      CheckpointError, BadStepError, LockError, CacheError, OSError: as `fope extend`.
    """
    if not isinstance(method, str):
        raise ConfigError(
            f"method = {method!r}; accepted: a name such as 'yarn', with knobs as position_factor=4"
        )
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
        raise ConfigError(f"length = {length!r}; accepted: a whole number of tokens")
    target, parent = as_path(workdir), _parent_of(run)
    extending = partial(
        extension.extend,
        parent,
        method,
        int(length),
        target,
        optimizer=optimizer,
        match=match,
        allow_shorter=allow_shorter,
        no_train=no_train,
        overrides=overrides_of(overrides, values),
        config=None if config is None else config_of(config, None, []),
    )
    with _session(verbose):
        _with_token_cache(extending, lambda: read_experiment(target))
        if evaluate:
            _evaluate_run(load(target), evaluation.evaluate, [], [], summarize)
    return load(target)


def report(
    runs: Run | Source | Sequence[Run | Source],
    out: Source,
    *,
    buckets: Sequence[int] = (),
    styles: Sequence[str] = (),
) -> Path:
    """Writes one HTML page about runs, as `fope report`; returns its path.

    Args:
      runs: runs, their directories, or results files.
      out: directory of the page, made if missing.
      buckets: also show scores in ranges of length with these edges, tokens.
      styles: names of variants, which look the same in all reports with these.

    Raises:
      ValueError: no runs; ReportError: what is no run, or rows that cannot be read or compared.
      OSError: the page cannot be written.
    """
    paths = [_evaluated_path(run) if isinstance(run, Run) else run for run in _listed(runs)]
    with quiet():
        return write_report(paths, out, buckets=buckets, styles=styles)


def spectrum(
    run: Run | Source,
    contexts: Sequence[int] = spectra.MULTIPLES,
    windows: int = spectra.WINDOWS,
    *,
    text: str | None = None,
    untrained: bool = False,
    verbose: bool = False,
) -> DataFrame:
    """Measures which frequencies attention uses, as `fope spectrum`; a row for context and layer.

    Args:
      run: a run with text, or its directory.
      contexts: lengths in multiples of the training length.
      windows: number of windows of each length.
      text: files to read in place of the run's split, as in ``evaluate.texts``: "mine=book.txt".
      untrained: measure the parameters that training began with.
      verbose: print messages to stderr.

    Raises:
      FileNotFoundError: no run, or no valid checkpoint.
      ValueError: no text, too little of it for a length, or a length or number below 1.
    """
    run = _opened(run)
    measuring = partial(
        spectra.measure_run,
        workdir_of(run),
        run.step,
        untrained=untrained,
        multiples=contexts,
        windows=windows,
        text=text,
        say=log.info,
    )
    with _session(verbose):
        measured = _with_token_cache(measuring, lambda: run.experiment)
    return data_frame(measured["rows"])


# ---------------------------------------------------------------------------- help of the verbs


@contextlib.contextmanager
def _session(verbose: bool) -> Iterator[None]:
    """How a verb runs in a user's process: silent, and ended by exceptions alone."""
    with log_to_stderr() if verbose else quiet(), keep_process():
        try:
            yield
        except Preempted as error:
            if error.exit_code != 128 + signal.SIGINT:
                raise
            raise KeyboardInterrupt(str(error)) from None
        except Exception as error:  # whose message is that of the command line
            text = re.sub("`[^`]*`", "", str(error))  # a whole command is one in Python too
            if OVERRIDE in text:
                error.add_note(f"{OVERRIDE}SECTION.KEY=VALUE is SECTION_KEY=VALUE in Python")
            elif "--as " in text:
                error.add_note("--as METHOD is positions=[METHOD] in Python")
            elif re.search(r"(^|\W)--[a-z]", text):
                error.add_note("--an-option is an_option=... in Python")
            raise


def _with_token_cache(run: Callable[[], Any], experiment: Callable[[], Experiment]) -> Any:
    """What ``run`` returns; where it finds no token cache, the experiment's is built first."""
    try:
        return run()
    except MissingCacheError as error:
        try:
            data = experiment().data
        except FileNotFoundError:  # nothing has been written yet
            raise error from None
        build(data)
        return run()


def _evaluate_runs(
    runs: Sequence[Run | Source],
    evaluating: Callable[..., list[Row]],
    overrides: Sequence[str],
    as_positions: str | Sequence[str],
    summary: Callable[[list[Row]], list[dict[str, Any]]],
    verbose: bool,
) -> DataFrame:
    as_positions = _texts("positions", as_positions, "yarn:factor=4")
    with _session(verbose):
        return data_frame(
            [
                record
                for run in runs
                for record in _evaluate_run(
                    _opened(run), evaluating, overrides, as_positions, summary
                )
            ]
        )


def _evaluate_run(
    run: Run,
    evaluating: Callable[..., list[Row]],
    overrides: Sequence[str],
    as_positions: Sequence[str],
    summary: Callable[[list[Row]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Records of what is measured of a run, by its own position embedding or others."""
    workdir = workdir_of(run)
    variants = make_variants(workdir, run.step, as_positions) if as_positions else []
    # Its cache may be looked for in the directory that an override names.
    config = partial(config_of, run.experiment, None, overrides)
    rows = _with_token_cache(
        partial(
            evaluating, workdir, run.step, overrides=overrides, variants=variants, say=log.info
        ),
        lambda: build_experiment(config()),
    )
    records = []
    for variant in variants or [Variant("", run.experiment.position)]:
        name = variant_experiment(run.experiment, variant).name
        ids = {"run": name, "method": positions.name_of(variant.position)}
        ids |= {"seed": run.experiment.seed, "step": run.step, "workdir": str(workdir)}
        own = [row for row in rows if row.get(AS, "") == variant.label]
        records += [ids | record for record in summary(own)]
    return records


def _listed(runs: Run | Source | Sequence[Run | Source]) -> Sequence[Run | Source]:
    listed = [runs] if not isinstance(runs, Iterable) or isinstance(runs, str) else list(runs)
    if not listed:
        raise ValueError("no runs; name one or more runs or their directories")
    return [run if isinstance(run, Run) else _path_text("run", run) for run in listed]


def _path_text(name: str, path: Any) -> str:
    """A path as text, for messages that name no Python object; ValueError for something else."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{name} = {path!r:.80}; accepted: a path or name, such as 'runs/fope'")
    return str(path)


def _texts(name: str, given: Any, example: str) -> list[str]:
    """One text or several as a list; ConfigError for anything else."""
    texts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"{name} holds {text!r:.80}; accepted: texts such as {example!r}")
    return texts


def _opened(run: Run | Source) -> Run:
    return run if isinstance(run, Run) else load(_path_text("run", run))


def _evaluated_path(run: Run) -> Source:
    """The step of a run as `fope report` names it; its directory where nothing is evaluated."""
    return workdir_of(run) if read_run(workdir_of(run)).step is None else _parent_of(run)


def _parent_of(run: Run | Source) -> str:
    """A parent as `fope extend --from` names it."""
    if isinstance(run, Run):
        return str(workdir_of(run) / str(run.step))
    return _path_text("run", run)


def _has_weights(directory: Path) -> bool:
    """Whether a directory has the config.json of a Hugging Face checkpoint."""
    path = directory / CONFIG
    return path.is_file() and is_of_weights(read_json(path))


def _load_weights(directory: Path, workdir: Source | None, overrides: Sequence[str]) -> Run:
    if workdir is not None:
        import_run(directory, workdir, overrides)
        return load(workdir)
    experiment = imported_experiment(directory, import_config(directory), overrides)

    def read_model() -> Transformer:
        imported = import_weights(directory)
        arrays = jax.device_put((imported.params, imported.constants))
        return merge(evaluation_graphdef(experiment), *arrays)

    tokenizer = partial(load_run_tokenizer, directory, experiment.data)
    return Run(experiment, 0, None, read_model, tokenizer)
